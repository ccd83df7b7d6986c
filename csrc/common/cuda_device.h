// What a launcher must know of the GPU. No torch header, no CUDA header.
#pragma once

struct CUstream_st;

namespace fastcnn {

constexpr int kSharedBytes = 48 << 10;  // of a block, on every GPU without asking for more

struct CudaDevice {
  int sm_count;
  CUstream_st* stream;              // cudaStream_t
  int shared_bytes = kSharedBytes;  // the most that a block may ask for
};

}  // namespace fastcnn
