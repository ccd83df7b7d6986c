// What main.cpp may launch. Written like an op's header: no device code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

// sum = x[0] + ... + x[n - 1]; partial: [blocks].
cudaError_t launch_block_sum(const int* x, int64_t n, unsigned blocks, unsigned threads,
                             bool with_barrier, int* partial, int* sum);

// Runs the named kernel of behaviour.cu; false where there is none of that name.
bool run_behaviour(const std::string& name);
