// fastcnn._C: what this build is, for Python, and the C library's malloc. No torch header: it
// imports before torch is looked at, so that a wrong torch can be told apart from a broken build.
#include <pybind11/pybind11.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "bindings/cuda_archs.h"
#include "cpu/capability.h"

namespace {

// False where the C library is not glibc: nothing was set.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of fastcnn.";
  m.attr("version") = FASTCNN_VERSION;
  m.attr("compiler") = FASTCNN_COMPILER;
  m.attr("cpu_levels") = FASTCNN_CPU_LEVELS;
  m.attr("cuda_version") = FASTCNN_CUDA_VERSION;  // of nvcc; empty: built without CUDA
  m.attr("cuda_archs") = FASTCNN_CUDA_ARCHS;
  m.def(
      "cpu_capability", [] { return fastcnn::name(fastcnn::cpu_level()); },
      "The instruction set that the CPU kernels use. RuntimeError if FASTCNN_CPU_CAPABILITY is "
      "not one that this processor has.");
  m.def("has_bf16_dot", &fastcnn::has_bf16_dot,
        "Whether the CPU kernels use the AVX512-BF16 dot product.");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Let glibc's malloc keep what is freed; False without glibc.");
  m.def("missing_cuda_code", &fastcnn::missing_cuda_code, pybind11::arg("archs"),
        pybind11::arg("capability"),
        "Why code built for `archs` cannot run on a GPU of this compute capability; '' if it can.");
}
