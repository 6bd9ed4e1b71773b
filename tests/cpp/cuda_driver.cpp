// Runs the emulated CUDA kernels beside the CPU's, over odd sizes, dtypes and options, with one block per sample, clusters, and
// memories in registers, in shared and in device memory; scripts/sanitize.py builds it with sanitizers.
//
// cuda_driver [content | write | scan | cell | ntm | ntm_cell | dnc | dnc_cell | sparse] [--seed N] [--few]
// --few: the cases for the next line
// cuda_driver OP --few [--omit-block N | --omit-warp N]      each thread leaves out its Nth barrier
// cuda_driver --plant divergent | late | out-of-bounds       kernels with a defect: to be noticed
#include "../../csrc/cuda/gpu.h"
#include "../../csrc/cuda/kernels.h"
#include "driver.h"

namespace {

// Scratch memory of one call: exactly as many bytes as asked for, filled with NaN.
struct Scratch {
  std::vector<std::unique_ptr<char[]>> blocks;
  cuda::Queue queue() {
    return {nullptr,
            [](void* self, size_t bytes) -> void* {
              auto& blocks = static_cast<Scratch*>(self)->blocks;
              blocks.emplace_back(new char[bytes]);
              std::memset(blocks.back().get(), 0xff, bytes);
              return blocks.back().get();
            },
            this};
  }
};

template <class Arguments, const char* (*kernel)(const Arguments&, const cuda::Queue&)>
bool run(const Arguments& a, const Parallel&) {
  Scratch scratch;
  const char* why = kernel(a, scratch.queue());
  if (why) fail(why);
  return true;
}

#define MANN_FAST_FUNCTION(op, Arguments) run<Arguments, cuda::op>,
const Kernels emulated = {"cuda", MANN_FAST_OPS(MANN_FAST_FUNCTION)};

template <class Run>
void compare(const char* name, Run function, const Case& c) {
  current = name;
  for (const int64_t value : {c.T, c.B, c.N, c.D, c.R, c.anchor_every}) current += " " + std::to_string(value);
  current += " dtypes " + std::to_string(static_cast<int>(c.state)) + " " + std::to_string(static_cast<int>(c.input));
  current += c.read_first ? " read first" : "";
  current += c.cut ? " cut" : "";
  const Results expected = function(*kernels(), c), actual = function(emulated, c);
  // Where float32 is further off the processor's kernels, these are the measure in float64, and what float32 may cost is told by
  // numbers that are one rounding off: one evaluation in float32 is near to the right one by luck.
  std::vector<Results> exact;
  for (size_t j = 0; j < expected.size(); ++j) {
    const double tolerance = c.input == Dtype::float64 ? 1e-9 : c.input == Dtype::float32 ? 1e-4 : 5e-2;
    const auto wrong = [&](const Results& right, double rounding) -> int64_t {
      double maximum = 1e-3;
      for (int64_t i = 0; i < right[j].count; ++i) maximum = std::max(maximum, std::abs(right[j][i]));
      for (int64_t i = 0; i < right[j].count; ++i)
        if (!(std::abs(right[j][i] - actual[j][i]) <= tolerance * maximum + rounding)) return i;
      return -1;
    };
    int64_t at = wrong(expected, 0);
    if (at >= 0 && c.input == Dtype::float32) {
      Case wide = c;
      wide.state = wide.input = Dtype::float64;
      for (nudged = static_cast<int>(exact.size()); nudged < 4; ++nudged) exact.push_back(function(*kernels(), wide));
      nudged = 0;
      double rounding = 0;
      for (const Results& beside : exact)
        for (int64_t i = 0; i < beside[j].count; ++i) rounding = std::max(rounding, std::abs(beside[j][i] - exact[0][j][i]));
      at = wrong(exact[0], 4 * rounding);
    }
    if (at >= 0)
      fail("result " + std::to_string(j) + " differs at " + std::to_string(at) + ": " + std::to_string(actual[j][at]) +
           ", expected " + std::to_string(expected[j][at]));
  }
}

// ---- kernels with a defect ------------------------------------------------------------------------------------------

void divergent_kernel(float*) {
  if (gpu::thread() < 40) gpu::sync();
}
void late_kernel(float* out) {  // the last value is read before it is written
  float* shared = reinterpret_cast<float*>(gpu::shared_memory());
  shared[gpu::thread()] = 1;
  out[gpu::thread()] = shared[gpu::threads() - 1 - gpu::thread()];
}
void out_of_bounds_kernel(float* out) { out[gpu::thread() + 1] = 1; }

int plant(const std::string& defect) {
  float out[64] = {};
  std::unique_ptr<float[]> heap(new float[64]());
  const gpu::Launch how{1, 64, 1, 64 * sizeof(float), nullptr};
  if (defect == "divergent") gpu::launch(divergent_kernel, how, out);
  if (defect == "late") gpu::launch(late_kernel, how, out);
  if (defect == "out-of-bounds") gpu::launch(out_of_bounds_kernel, how, heap.get());
  for (const float x : out)
    if (defect == "late" && x != 1) return 1;
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  gpu::emulation::Settings& settings = gpu::emulation::settings();
  std::string only;
  bool few = false;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--plant") return plant(arguments[i + 1]);
    if (argument == "--seed") settings.seed = std::strtoull(arguments[++i], nullptr, 10);
    else if (argument == "--few") few = true;
    else if (argument == "--omit-block") settings.omitted_of_block = std::atoi(arguments[++i]);
    else if (argument == "--omit-warp") settings.omitted_of_warp = std::atoi(arguments[++i]);
    else only = argument;
  }
  if (kernels() == nullptr) fail("this processor does not have the instruction set");
  const Dtype single = Dtype::float32, wide = Dtype::float64;
  struct Layout {
    int64_t T, B, N, D, R;
    Dtype state, input;
    size_t shared;
  };
  const size_t all = 227 * 1024;
  const Layout layouts[] = {{3, 2, 40, 5, 3, single, single, all},           // registers, one block
                            {4, 1, 33, 40, 4, single, single, all},          //
                            {3, 1, 20, 9, 1, single, single, all},           // one head
                            {3, 1, 300, 3, 2, single, single, all},          // registers, a cluster
                            {3, 1, 40, 70, 2, single, single, all},          // shared memory
                            {3, 1, 150, 33, 5, wide, wide, all},             //
                            {3, 1, 260, 70, 3, single, single, 64 * 1024},   // shared memory, a cluster
                            {3, 1, 150, 70, 2, single, single, 24 * 1024},   // device memory
                            {2, 1, 17, 3, 4, single, Dtype::bfloat16, all},  //
                            {2, 1, 16, 64, 6, single, Dtype::float16, all},  //
                            {1, 1, 500, 2, 250, single, single, all},        // least_used keeps half: all its barriers matter
                            {3, 1, 120, 33, 4, single, single, all},         // sizes that are known when compiled
                            {3, 1, 120, 20, 1, single, single, all},         //
                            {1, 1, 1, 1, 1, single, single, all},            //
                            {0, 2, 4, 4, 1, single, single, all},            //
                            {3, 0, 4, 4, 1, single, single, all}};           //
  int cases = 0;
  for (const Layout& layout : layouts) {
    if (few && layout.state != single) continue;
    settings.limits.shared = layout.shared;
    const bool known = layout.N == 120;  // with a target of its own for each head
    // few: within the bound of exp, and beyond it
    for (int options = few && !known ? 2 : 0; options < (known ? 4 : 8); options += few && !known ? 3 : 1) {
      const bool sharp = options & 1, read_first = options & 2, shared_target = options & 4;
      Case c = {layout.T,     layout.B, layout.N,   layout.D,      layout.R, layout.state,
                layout.input, sharp,    read_first, shared_target, 2,        1};
      if (layout.R > 9 && only != "write") continue;
      if (only.empty() || only == "content") compare("content", content, c);
      if (only.empty() || only == "write") compare("write", write, c);
      for (const bool cut : {false, true}) {
        if (cut && !few && options != 0 && options != 3) continue;
        c.cut = cut;
        if (only.empty() || only == "scan") compare("scan", scan, c);
        if (only.empty() || only == "ntm") compare("ntm", ntm, c);
        if (known) continue;  // to the DNC's kernels all small sizes are the same
        if (only.empty() || only == "dnc") compare("dnc", dnc, c);
        if (!read_first && (only.empty() || only == "sparse")) compare("sparse", sparse, c);  // which has one order
      }
      ++cases;
    }
  }
  // With as many multiprocessors as a cluster shall have blocks, each block has a sample.
  struct CellLayout {
    Layout sizes;
    int cluster;  // that the weights need, and fewer without learned sharpness or the hidden state
  };
  const CellLayout cells[] = {{{3, 3, 20, 16, 4, single, single, 64 * 1024}, 2},  //
                              {{3, 2, 9, 5, 3, single, single, all}, 1},  // several heads at a time, not all of them there
                              {{3, 5, 20, 16, 4, single, single, 40 * 1024}, 4},   // what a replay keeps in device memory
                              {{3, 11, 12, 24, 3, single, single, 54 * 1024}, 8},  //
                              {{3, 9, 12, 24, 3, single, single, 48 * 1024}, 16},  //
                              {{3, 1, 120, 33, 4, single, single, all}, 1},  // sizes that are known when compiled, forward
                              {{3, 1, 150, 9, 2, single, single, all}, 1},   // the memory in shared memory
                              {{3, 1, 300, 40, 6, single, single, 136 * 1024}, 8},  // and in device memory
                              {{3, 2, 20, 9, 3, wide, wide, all}, 1}};              //
  for (const CellLayout& layout : cells) {
    const Layout& n = layout.sizes;
    const auto asked = [&](const char* op) { return only.empty() || only == op; };
    if (!asked("cell") && !asked("ntm_cell") && !asked("dnc_cell")) continue;
    if (few && layout.cluster > 2) continue;
    const bool large = layout.cluster > 2;  // thousands of fibers: a few cases must do
    settings.limits.shared = n.shared;
    settings.limits.processors = layout.cluster;
    const bool known = n.N == 120;
    for (int options = few && !known ? 2 : 0; options < (known ? 2 : 8); options += (few && !known) || large ? 3 : 1) {
      const Controller kind = static_cast<Controller>((options + 1) % 3);
      Case c = {n.T, n.B, n.N, n.D, n.R, n.state, n.input, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0, 2, 1};
      for (const bool cut : {false, true}) {
        if (cut && !few && options != 0 && options != 3) continue;
        c.cut = cut;
        // Beside LRUA's heads: an NTM's values, and what the warps tell each other of them; what a DNC's warps have of each slot.
        settings.limits.shared = n.shared + (n.N < 300 ? 32 : 192) * 1024;
        if (asked("dnc_cell"))
          compare("dnc_cell", [kind](const Kernels& k, const Case& c) { return dnc_cell(k, c, kind, false); }, c);
        settings.limits.shared = std::min(all, n.shared + 11 * 1024 * static_cast<size_t>(n.R));
        if (asked("ntm_cell"))
          compare("ntm_cell", [kind](const Kernels& k, const Case& c) { return ntm_cell(k, c, kind, false); }, c);
        settings.limits.shared = n.shared;
        if (asked("cell")) compare("cell", [kind](const Kernels& k, const Case& c) { return cell(k, c, kind, false); }, c);
      }
      if (!asked("cell")) continue;
      if (kind != Controller::feedforward && c.sharp && gpu::emulation::machine().cluster != layout.cluster)
        fail("a cluster of " + std::to_string(gpu::emulation::machine().cluster) + ", expected " +
             std::to_string(layout.cluster));
      ++cases;
    }
  }
  const Layout sparse_layouts[] = {{3, 1, 1030, 66, 3, single, single, all},               // several blocks search
                                   {3, 2, 700, 130, 1, wide, wide, all},                   //
                                   {4, 1, 8200, 7, 4, single, single, all},                // more chunks than a warp has lanes
                                   {2, 1, 40, 20, 5, single, Dtype::bfloat16, 4 * 1024}};  // all in device memory
  for (const Layout& n : sparse_layouts) {
    if ((!only.empty() && only != "sparse") || (few && n.state != single)) continue;
    settings.limits.shared = n.shared;
    settings.limits.processors = 132;
    for (const bool cut : {false, true}) {
      const bool alike = n.N > 8192;  // so that few rows are put in a list
      Case c = {n.T, n.B, n.N, n.D, n.R, n.state, n.input, true, false, alike, 2, 1};
      c.cut = cut;
      compare("sparse", sparse, c);
      ++cases;
    }
  }
  std::printf("%d cases, at most %d barriers of a block and %d of a warp\n", cases, gpu::emulation::machine().most_met_block,
              gpu::emulation::machine().most_met_warp);
  return 0;
}
