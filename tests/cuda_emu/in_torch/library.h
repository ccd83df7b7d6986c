// In front of the torch glue (csrc/<op>.cpp) in the emulated build, see ../library.py: what it
// registers for CUDA is registered for PrivateUse1, beside _ops.so's own, and called with CPU
// tensors; what it registers for the CPU is left out.
#pragma once

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) FASTCNN_EMULATED_##key(ns, m)
#define FASTCNN_EMULATED_CUDA(ns, m) _STABLE_TORCH_LIBRARY_IMPL(ns, PrivateUse1, m, C10_UID)
#define FASTCNN_EMULATED_CPU(ns, m) \
  [[maybe_unused]] static void left_out(torch::stable::detail::StableLibrary& m)
