// Runs kernels over arrays with nothing of torch around them, family by family. For kernels_driver.cpp and cuda_driver.cpp.
#pragma once
#include "cell.h"
#include "dnc.h"
#include "lrua.h"
#include "ntm.h"
#include "sparse.h"
