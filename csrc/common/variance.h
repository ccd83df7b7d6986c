// The variance of values whose squares are beyond the type.
#pragma once

#include "common/types.h"

namespace fastcnn {

// var, and infinity where it is NaN beside a finite mean: the sum of the squares was infinite then
// and so was what was subtracted from it. As PyTorch's variance, which makes y the bias. With a NaN
// or an infinity among the values, which the mean shows, it stays NaN.
template <class S>
FASTCNN_HOST_DEVICE S variance_of(S mean, S var) {
  return var == var || mean - mean != 0 ? var : static_cast<S>(__builtin_inff());
}

}  // namespace fastcnn
