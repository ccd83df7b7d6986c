// Which GPUs a binary's CUDA code runs on.
#pragma once

#include <string>
#include <string_view>

namespace fastcnn {

// Why a binary built for `archs` ("80-real,90": machine code for sm_80, machine code and PTX for
// sm_90) cannot run on a GPU of compute capability `capability` (87 for sm_87); empty if it can.
// Machine code runs on GPUs of the same major version and at least the same minor one; PTX is
// compiled by the driver for every later GPU.
inline std::string missing_cuda_code(std::string_view archs, int capability) {
  std::string_view rest = archs;
  while (!rest.empty()) {
    const size_t end = rest.find(',');
    const std::string_view arch = rest.substr(0, end);
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    const int number = std::stoi(std::string(arch));
    const bool code = arch.find("-virtual") == std::string_view::npos;
    const bool ptx = arch.find("-real") == std::string_view::npos;
    if (code && number / 10 == capability / 10 && number <= capability) return "";
    if (ptx && number <= capability) return "";
  }
  return "expected a GPU that its CUDA code for " + std::string(archs) + " runs on, got sm_" +
         std::to_string(capability) +
         "; rebuild with FASTCNN_CUDA_ARCHS=" + std::to_string(capability);
}

}  // namespace fastcnn
