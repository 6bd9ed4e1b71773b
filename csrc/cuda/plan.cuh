// Where a scan's block has room for what, and which kernel that asks for; for both directions.
#pragma once
#include "scan.cuh"

namespace mann_fast {
namespace cuda {

// The pieces of a block's memory: near is shared memory, far this block's part of scratch.
struct Places {
  Carver near, far;
  __device__ __forceinline__ Places(const Plan& plan, unsigned char* scratch)
      : near(gpu::shared_memory()), far(scratch + gpu::block() * plan.scratch) {}
  __device__ __forceinline__ Carver& of(bool is_near) { return is_near ? near : far; }
};

template <class Side>
void place(Plan& plan, int64_t every, const gpu::Limits& limits) {
  Carver small(nullptr), slots(nullptr), tiles(nullptr);
  typename Side::Small(small, plan);
  typename Side::Slots(slots, plan, every);
  typename Side::Tiles(tiles, plan, every);
  plan.shared = plan.scratch = 0;
  const auto fit = [&](const Carver& part) {
    const bool near = plan.shared + part.used <= limits.shared;
    (near ? plan.shared : plan.scratch) += part.used;
    return near;
  };
  plan.near_small = fit(small);
  plan.near_slots = fit(slots);
  plan.near_tiles = fit(tiles);
}

// ---- which kernel ---------------------------------------------------------------------------------------------------

// Calls f with types and sizes of the kernel that a plan asks for.
template <class F>
const char* with_kernel(const Plan& plan, Dtype state, F f) {
  const std::integral_constant<int, 4> four;
  if (state == Dtype::float64) return f(double(), four, four, std::false_type());
  if (!plan.resident) return f(float(), std::integral_constant<int, 8>(), four, std::false_type());
  const auto in_registers = [&](auto c) {
    if (plan.heads_at_once == 1) return f(float(), c, std::integral_constant<int, 1>(), std::true_type());
    return f(float(), c, four, std::true_type());
  };
  switch (plan.piece_columns) {
    case 2: return in_registers(std::integral_constant<int, 2>());
    case 4: return in_registers(four);
    case 5: return in_registers(std::integral_constant<int, 5>());
    default: return in_registers(std::integral_constant<int, 8>());
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Side, class T>
Plan plan_scan(int64_t B, int64_t N, int64_t D, int64_t R, int64_t every, const gpu::Limits& limits) {
  Plan plan{};
  plan.N = static_cast<int>(N);
  plan.D = static_cast<int>(D);
  plan.R = static_cast<int>(R);
  const int64_t groups = ceil_div(N, warp_slots), lane_columns = ceil_div(D, column_lanes);
  const int most_warps = most_threads / 32;
  const auto lay_out = [&](int cluster) {
    plan.cluster = cluster;
    plan.heads_at_once = plan.resident && R == 1 ? 1 : 4;
    plan.heads = static_cast<int>(ceil_div(R, plan.heads_at_once)) * plan.heads_at_once;
    plan.warps = static_cast<int>(groups < most_warps ? groups : most_warps);
    plan.groups = static_cast<int>(ceil_div(groups, static_cast<int64_t>(plan.warps) * cluster));
    plan.span = plan.groups * plan.warps * warp_slots;
    plan.pieces = static_cast<int>(ceil_div(lane_columns, plan.piece_columns));
    plan.columns = plan.pieces * plan.piece_columns * column_lanes;
    place<Side>(plan, every, limits);
  };
  if (sizeof(T) == 4 && lane_columns <= 8) {
    plan.resident = true;
    plan.piece_columns = lane_columns <= 2 ? 2 : lane_columns <= 4 ? 4 : lane_columns <= 5 ? 5 : 8;
    for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
      lay_out(cluster);
      if (plan.groups == 1 && plan.near_small) return plan;
    }
  }
  plan.resident = false;
  plan.piece_columns = sizeof(T) == 4 ? 8 : 4;
  for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    lay_out(cluster);
    if (plan.near_small && plan.near_slots && plan.near_tiles) return plan;
  }
  // Nothing is near enough: device memory serves it all the faster the more blocks share it.
  lay_out(B >= limits.processors ? 1 : limits.cluster);
  if (!plan.near_small) lay_out(1);  // what is exchanged must be in shared memory for a cluster
  return plan;
}

// Where a block counts what it has, it counts with 32 bits.
inline const char* too_large(int64_t N, int64_t D, int64_t R) {
  if (N >= 1 << 24) return "the kernel takes fewer than 2^24 slots";
  if (R * D >= 1 << 26) return "the kernel takes fewer than 2^26 numbers in the keys of a step";
  if (R * N >= 1 << 28) return "the kernel takes fewer than 2^28 weights in a step";
  return nullptr;
}

}  // namespace cuda
}  // namespace mann_fast
