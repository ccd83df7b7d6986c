// Colour of grey levels 0 to 255, defined once for host and device, for scalars and for the CPU's
// vectors: brightness, contrast, saturation and hue of torchvision.transforms.v2.functional on
// floating images, without its scaling to 1.
#pragma once

#include "common/types.h"

namespace fastcnn {

constexpr float kTopLevel = 255.f;

template <class V>
FASTCNN_HOST_DEVICE V clamp_level(V level) {
  const V zero = V{}, top = zero + kTopLevel;
  return level < zero ? zero : (level > top ? top : level);
}

// ITU-R BT.601 as torchvision writes it.
template <class V>
FASTCNN_HOST_DEVICE V gray(V r, V g, V b) {
  return r * 0.2989f + g * 0.587f + b * 0.114f;
}

// What brightness (towards 0), contrast (towards the mean) and saturation (towards grey) are.
template <class V>
FASTCNN_HOST_DEVICE V blend(V level, V towards, float factor) {
  return clamp_level(level * factor + towards * (1.f - factor));
}

template <class V>
FASTCNN_HOST_DEVICE V magnitude(V value) {
  return value < V{} ? -value : value;
}

// Where a channel lies between the least (0) and the largest one (1). `sixths` of a turn are
// between the colour's hue and the channel's own, red, green or blue: up to one it is 1, from two
// on 0.
template <class V>
FASTCNN_HOST_DEVICE V hue_share(V sixths) {
  const V zero = V{}, one = zero + 1.f, share = 2.f - sixths;
  return share < zero ? zero : (share > one ? one : share);
}

// Turns the hue by -0.5 to 0.5 turns: to HSV and back, whose value and range stay.
template <class V>
FASTCNN_HOST_DEVICE void turn_hue(V& r, V& g, V& b, float turns) {
  const V zero = V{};
  const V high = r > g ? (r > b ? r : b) : (g > b ? g : b);
  const V low = r < g ? (r < b ? r : b) : (g < b ? g : b);
  const V range = high - low;
  const V inverse = 1.f / (range > zero ? range : zero + 1.f);
  V hue = high == r   ? (g - b) * inverse
          : high == g ? (b - r) * inverse + 2.f
                      : (r - g) * inverse + 4.f;  // in sixths of a turn, from -1 to 5
  hue += 6.f * turns;
  hue = hue < zero ? hue + 6.f : hue;
  hue = hue >= zero + 6.f ? hue - 6.f : hue;
  const V from_red = magnitude(hue - 3.f);  // 3 where the hue is red
  r = low + range * hue_share(3.f - from_red);
  g = low + range * hue_share(magnitude(hue - 2.f));
  b = low + range * hue_share(magnitude(hue - 4.f));
}

}  // namespace fastcnn
