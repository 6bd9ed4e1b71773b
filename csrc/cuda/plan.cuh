// Where a scan's block has room for what, and which kernel that asks for; for both directions.
#pragma once
#include "kernels.h"
#include "scan.cuh"

namespace mann_fast {
namespace cuda {

// The pieces of a block's memory: near is shared memory, far its part of scratch.
struct Places {
  Carver near, far;
  // From byte `start` of shared memory on, and of scratch such a part.
  __device__ __forceinline__ Places(const Plan& plan, unsigned char* scratch, size_t start = 0, int64_t part = gpu::block())
      : near(gpu::shared_memory() + start), far(scratch + part * plan.scratch) {}
  // Where it is known when compiled that something is near, the compiler knows that its pointers are to shared memory: loads
  // are of that kind, and pointers take half the registers.
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

// Calls f with the columns of a tile that a plan asks for, and whether it stays in registers.
template <class T, class F>
const char* with_tile(const Plan& plan, F f) {
  const std::integral_constant<int, 4> four;
  const std::integral_constant<int, 8> eight;
  if constexpr (sizeof(T) == 8) return f(four, std::false_type());
  else if (!plan.resident) return f(eight, std::false_type());
  else {
    switch (plan.piece_columns) {
      case 2: return f(std::integral_constant<int, 2>(), std::true_type());
      case 4: return f(four, std::true_type());
      case 5: return f(std::integral_constant<int, 5>(), std::true_type());
      default: return f(eight, std::true_type());
    }
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Completes a plan that has the sizes.
template <class Side, class T>
Plan plan_scan(Plan plan, int64_t B, int64_t every, const gpu::Limits& limits) {
  const int64_t N = plan.N, D = plan.D, R = plan.R;
  const int64_t groups = ceil_div(N, warp_slots), lane_columns = ceil_div(D, column_lanes);
  const int most_warps = most_threads / 32;
  const auto lay_out = [&](int cluster) {
    plan.cluster = cluster;
    plan.heads_at_once = Side::heads_at_once(plan);
    plan.heads = static_cast<int>(ceil_div(R, plan.heads_at_once)) * plan.heads_at_once;
    plan.warps = static_cast<int>(groups < most_warps ? groups : most_warps);
    if (plan.warps < plan.least_warps) plan.warps = plan.least_warps;
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
      if (plan.groups == 1 && plan.near_small && (plan.near_slots || plan.slots_anywhere)) return plan;
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

// Steps of a replay, no more than there are.
template <class Arguments>
int every_of(const Arguments& a) {
  return static_cast<int>(a.T < a.anchor_every ? (a.T > 0 ? a.T : 1) : a.anchor_every);
}

inline Layout layout_of(const Plan& plan) {
  const char* memory = plan.resident ? "registers" : plan.near_tiles ? "shared memory" : "device memory";
  return {plan.cluster, plan.warps, memory, plan.shared};
}

// Where a block counts what it has, it counts with 32 bits.
inline const char* too_large(int64_t N, int64_t D, int64_t R) {
  if (N >= 1 << 24) return "the kernel takes fewer than 2^24 slots";
  // Eight warps have three such parts in backward: keys, padded to four heads and 64 numbers.
  if ((R + 3) * (D + 63) >= 1 << 26) return "the kernel takes fewer than 2^26 numbers in the padded keys of a step";
  if (R * N >= 1 << 28) return "the kernel takes fewer than 2^28 weights in a step";
  return nullptr;
}

}  // namespace cuda
}  // namespace mann_fast
