// The raw ops on LibTorch's stable ABI, for whichever device has the kernels: a Device is made from a tensor on it and runs
// what it is given. Schemas and fake rules are in mann_fast/ops/*.py, which also checks every argument: only there can
// ValueError and TypeError be raised. What is checked here guards against a caller of torch.ops.mann_fast that bypasses it.
#pragma once
#include "bindings/cell.h"
#include "bindings/content.h"
#include "bindings/dnc.h"
#include "bindings/lrua.h"
#include "bindings/ntm.h"
#include "bindings/sparse.h"
#include "include/ops.h"
