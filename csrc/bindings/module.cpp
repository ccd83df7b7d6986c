// fastcnn._C: what this build is, for Python, the C library's malloc, comparisons for guards, and
// snapshots of memory. No torch header: it imports before torch is looked at, so that a wrong torch
// can be told apart from a broken build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "bindings/cuda_archs.h"
#include "bindings/guard.h"
#include "cpu/capability.h"
#include "cpu/snapshot.h"

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
  m.def("has_fast_bf16", &fastcnn::has_fast_bf16,
        "Whether this processor multiplies bfloat16 faster than float32.");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Let glibc's malloc keep what is freed; False without glibc.");
  m.def("missing_cuda_code", &fastcnn::missing_cuda_code, pybind11::arg("archs"),
        pybind11::arg("capability"),
        "Why code built for `archs` cannot run on a GPU of this compute capability; '' if it can.");
  m.def("first_changed", &fastcnn::first_changed, pybind11::arg("values"), pybind11::arg("missing"),
        pybind11::arg("start"),
        "The first of the tuples (dictionary, name, value, ...) whose dictionary has another "
        "object of that name; -1 if none.");
  m.def("first_filled", &fastcnn::first_filled, pybind11::arg("dictionaries"),
        pybind11::arg("names"),
        "The first dictionary with no empty dictionary under one of the names; -1 if none.");
  m.def("first_of_another_type", &fastcnn::first_of_another_type, pybind11::arg("objects"),
        pybind11::arg("types"), pybind11::arg("start"),
        "The first object that is not of its type; -1 if none.");
  using fastcnn::Snapshot;
  pybind11::class_<Snapshot>(m, "Snapshot",
                             "Dense memory as it was, by address: csrc/cpu/snapshot.h")
      .def(pybind11::init<const std::vector<Snapshot::Block>&, uintptr_t, size_t, size_t, size_t>(),
           pybind11::arg("vectors"), pybind11::arg("filters_at"), pybind11::arg("filters"),
           pybind11::arg("size"), pybind11::arg("element_bytes"))
      .def("is_current", &Snapshot::is_current,
           "Whether nothing has been written, as far as one call looks. The memory must be there.");
}
