// block_sum N BLOCKS THREADS | no_barrier N BLOCKS THREADS: prints the sum of 1 .. N, the same
// under every schedule. Anything else: a case of behaviour.cu.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "planted.h"

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (argc == 5 && (name == "block_sum" || name == "no_barrier")) {
    const int64_t n = std::atoll(argv[2]);
    const unsigned blocks = std::atoi(argv[3]), threads = std::atoi(argv[4]);
    const auto x = std::make_unique<int[]>(n), partial = std::make_unique<int[]>(blocks);
    std::iota(x.get(), x.get() + n, 1);
    int sum = 0;
    cuda_emu::check_schedules({{"sum", &sum, sizeof sum}}, [&] {
      if (launch_block_sum(x.get(), n, blocks, threads, name == "block_sum", partial.get(), &sum) !=
          cudaSuccess)
        std::abort();
    });
    std::printf("%d\n", sum);
    return 0;
  }
  if (run_behaviour(name)) return 0;
  std::fprintf(stderr, "no case is called '%s'\n", name.c_str());
  return 2;
}
