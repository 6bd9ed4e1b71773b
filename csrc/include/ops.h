// Every raw op, once: its name in torch.ops and the structure of its arguments (arguments.h). The declarations of the kernels,
// the table of each instruction set, both registrations with torch and the tests' drivers are made from these lists.
#pragma once
#include "arguments.h"

#define MANN_FAST_CONTENT_OPS(OP) \
  OP(content_read, ContentRead)   \
  OP(content_read_backward, ContentReadBackward)

#define MANN_FAST_LRUA_OPS(OP)               \
  OP(least_used, LeastUsed)                  \
  OP(lrua_write, LruaWrite)                  \
  OP(lrua_write_backward, LruaWriteBackward) \
  OP(lrua_scan, LruaScan)                    \
  OP(lrua_scan_backward, LruaScanBackward)

#define MANN_FAST_CELL_OPS(OP)           \
  OP(cell, Cell)                         \
  OP(cell_backward, CellBackward)        \
  OP(ntm_cell, NtmCell)                  \
  OP(ntm_cell_backward, NtmCellBackward) \
  OP(dnc_cell, DncCell)                  \
  OP(dnc_cell_backward, DncCellBackward)

#define MANN_FAST_NTM_OPS(OP) \
  OP(ntm_scan, NtmScan)       \
  OP(ntm_scan_backward, NtmScanBackward)

#define MANN_FAST_DNC_OPS(OP) \
  OP(dnc_scan, DncScan)       \
  OP(dnc_scan_backward, DncScanBackward)

#define MANN_FAST_SPARSE_OPS(OP)               \
  OP(sparse_read, SparseRead)                  \
  OP(sparse_read_backward, SparseReadBackward) \
  OP(sparse_scan, SparseScan)                  \
  OP(sparse_scan_backward, SparseScanBackward)

#define MANN_FAST_SPARSE_CELL_OPS(OP) \
  OP(sparse_cell, SparseCell)         \
  OP(sparse_cell_backward, SparseCellBackward)

// Those that CUDA has kernels for, too.
#define MANN_FAST_OPS(OP)   \
  MANN_FAST_CONTENT_OPS(OP) \
  MANN_FAST_LRUA_OPS(OP)    \
  MANN_FAST_CELL_OPS(OP)    \
  MANN_FAST_NTM_OPS(OP)     \
  MANN_FAST_DNC_OPS(OP)     \
  MANN_FAST_SPARSE_OPS(OP)

#define MANN_FAST_CPU_OPS(OP) \
  MANN_FAST_OPS(OP)           \
  MANN_FAST_SPARSE_CELL_OPS(OP)
