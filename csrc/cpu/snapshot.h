// Snapshot: dense memory as it was, by which writes are seen that no version counter tells.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fastcnn {

// Memory of a convolution's tensors: vectors of one number a channel, and the filters,
// [filters, size] elements of 1, 2, 4 or 8 bytes. Reads nothing else, and owns none of it.
class Snapshot {
 public:
  using Block = std::pair<uintptr_t, size_t>;  // address, bytes

  // Throws std::invalid_argument for elements of another size.
  Snapshot(const std::vector<Block>& vectors, uintptr_t filters_at, size_t filters, size_t size,
           size_t element_bytes);

  // Whether nothing has been written, as far as one call looks: at the vectors wholly, and at one
  // element of each filter, the next call at another one; `size` calls look at all.
  bool is_current();

 private:
  uint64_t checksum(size_t place) const;

  std::vector<Block> vectors_;
  std::vector<char> copies_;         // of the vectors, one behind the other
  std::vector<uint64_t> checksums_;  // [size]: over the filters' elements at one place
  uintptr_t filters_at_;
  size_t filters_, size_, element_bytes_, step_;
  std::atomic<size_t> calls_{0};
};

}  // namespace fastcnn
