// Runs every kernel over odd sizes, dtypes and options, with nothing of torch around it, so that scripts/sanitize.py can
// build it with sanitizers: each array is a heap block of its own and exactly as long as the kernel may touch, and tasks
// run on threads. Checks beside that: every number of every output is written and finite, and threads change nothing
// beyond rounding. What the numbers are is tested from Python.
#include "driver.h"

namespace {

// Runs the case on one thread and on several; the number of threads decides how slots are split, so sums are rounded
// otherwise, and no more than that.
template <class Run>
void check(const char* name, Run run, const Kernels& k, Case c) {
  current = std::string(k.isa) + " " + name;
  current += c.cut ? " cut" : "";
  for (const int64_t value : {c.T, c.B, c.N, c.D, c.R, c.anchor_every, c.threads}) current += " " + std::to_string(value);
  current += " dtypes " + std::to_string(static_cast<int>(c.state)) + " " + std::to_string(static_cast<int>(c.input));
  const Results several = run(k, c);
  c.threads = 1;
  const Results one = run(k, c);
  for (size_t j = 0; j < one.size(); ++j) {
    const double tolerance = one[j].dtype == Dtype::float64 ? 1e-9 : one[j].dtype == Dtype::float32 ? 1e-3 : 5e-2;
    double maximum = 1e-3;
    for (int64_t i = 0; i < one[j].count; ++i) maximum = std::max(maximum, std::abs(one[j][i]));
    for (int64_t i = 0; i < one[j].count; ++i) {
      if (!std::isfinite(one[j][i]) || !std::isfinite(several[j][i]))
        fail("result " + std::to_string(j) + " is not finite at " + std::to_string(i));
      if (std::abs(one[j][i] - several[j][i]) > tolerance * maximum)
        fail("result " + std::to_string(j) + " depends on the threads at " + std::to_string(i));
    }
  }
}

}  // namespace

int main() {
  const Kernels* k = kernels();
  if (k == nullptr) {
    std::puts("this processor does not have the instruction set");
    return 77;
  }
  const int64_t sizes[][5] = {// T, B, N, D, R
                              {1, 1, 1, 1, 1},    {3, 2, 5, 3, 2},     {4, 1, 17, 7, 3},  {2, 3, 33, 16, 5}, {5, 1, 130, 9, 4},
                              {2, 1, 64, 33, 1},  {3, 2, 4, 1, 4},     {2, 5, 16, 64, 6}, {0, 2, 4, 4, 1},   {3, 0, 4, 4, 1},
                              {2, 1, 301, 20, 4}, {2, 1, 1037, 33, 4}, {3, 19, 6, 5, 2}};
  const Dtype dtypes[][2] = {{Dtype::float32, Dtype::float32},
                             {Dtype::float64, Dtype::float64},
                             {Dtype::float32, Dtype::bfloat16},
                             {Dtype::float32, Dtype::float16}};
  int cases = 0;
  for (const auto& size : sizes)
    for (const auto& dtype : dtypes)
      for (int options = 0; options < 8; options += &dtype == &dtypes[0] ? 1 : 3) {
        const bool sharp = options & 1, read_first = options & 2, shared_target = options & 4;
        Case c = {size[0], size[1], size[2], size[3], size[4], dtype[0], dtype[1], sharp, read_first, shared_target, 0, 3};
        if (!read_first) {  // an option of the scan only
          check("content", content, *k, c);
          check("write", write, *k, c);
          if (!shared_target) check("sparse steps", sparse_steps, *k, c);
        }
        for (const int variant : {0, 1, 2, 3}) {
          c.anchor_every = variant < 2 ? variant : 2;
          c.cut = variant == 3;
          check("scan", scan, *k, c);
          if (!shared_target) check("ntm", ntm, *k, c);  // an option of the scan only
          if (variant != 2) check("dnc", dnc, *k, c);    // it keeps something or nothing, not every so many steps
          if (variant != 2 && !read_first) check("sparse", sparse, *k, c);  // the same
          if (c.state != c.input) continue;
          for (const Controller kind : {Controller::lstm, Controller::gru, Controller::feedforward})
            for (const auto& [name, network] : {std::pair{"cell", cell}, std::pair{"ntm_cell", ntm_cell},
                                                std::pair{"dnc_cell", dnc_cell}, std::pair{"sparse_cell", sparse_cell}}) {
              if (network != cell && (variant == 1 || variant == 2)) continue;  // what differs there, cell shows
              check(
                  name,
                  [kind, run = network](const Kernels& k, const Case& c) {
                    return run(k, c, kind, c.state == Dtype::float32 && c.shared_target);
                  },
                  *k, c);
            }
        }
        ++cases;
      }
  std::printf("%s: %d cases\n", k->isa, cases);
}
