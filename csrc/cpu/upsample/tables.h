// What upsample's CPU kernels know of a call before it runs: which pixels are made of which, where
// they lie, and how the work is cut.
#pragma once

#include "cpu/spans.h"
#include "upsample.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {

constexpr int kGroup = 4;                // rows at a time
constexpr int64_t kTileElements = 1024;  // of a row: a group's rows stay in the L1 or L2 cache
constexpr int64_t kMinBand = 8;          // rows of a task; each task stretches up to two once more

template <class S>
struct IndexOf {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};
template <class S>
using Index = typename IndexOf<S>::type;

// Sources of one axis, and of each input pixel the outputs made of it with their shares.
template <class S>
struct AxisTable {
  int64_t in, out;
  bool linear;
  Scratch<Source<S>> sources;   // [out]
  Scratch<int32_t> begin, end;  // [in]: input pixel i is in outputs [begin, end)
  Scratch<int64_t> offset;      // [in]: of begin's share
  Scratch<S> shares;

  AxisTable(const Axis& axis, Sampling sampling, bool backward)
      : in(axis.in),
        out(axis.out),
        linear(Sampler<S>(axis, sampling).linear),
        sources(out),
        begin(backward ? in : 0),
        end(backward ? in : 0),
        offset(backward ? in : 0),
        shares(backward ? 2 * out : 0) {
    const Sampler<S> sampler(axis, sampling);
    for (int64_t o = 0; o < out; ++o) sources[o] = sampler.at(static_cast<int32_t>(o));
    if (!backward) return;
    int64_t total = 0;
    int32_t previous = 0, first = 0, after = 0;  // of pixels i - reach, i, i + 1
    for (int64_t i = 0; i < in; ++i) {
      while (after < out && sources[after].index <= i) ++after;
      begin[i] = linear ? previous : first;
      end[i] = after;
      offset[i] = total;
      for (int64_t o = begin[i]; o < end[i]; ++o) {
        shares[total++] = share_of(sources[o], static_cast<int32_t>(i));
      }
      previous = first;
      first = after;
    }
  }

  int64_t length(int64_t i) const { return end[i] - begin[i]; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t i = 0; i < in; ++i) most = max(most, length(i));
    return most;
  }
};

// Where the elements of a row are picked from: lane l of block b is element base[b] + at[b * lanes
// + l] of another row.
template <class S>
struct Picks {
  Scratch<int64_t> base;
  Scratch<Index<S>> at;
  bool near = true;  // every block's elements lie within two vectors

  explicit Picks(int64_t elements)
      : base(ceil_div(elements, kLanes<S>)), at(ceil_div(elements, kLanes<S>) * kLanes<S>) {}

  // Elements come in order; their places fall by less than a pixel of k elements, if at all.
  void set(int64_t element, int64_t place, int64_t k) {
    if (element % kLanes<S> == 0) base[element / kLanes<S>] = place / k * k;
    at[element] = relative(element, place);
  }
  Index<S> relative(int64_t element, int64_t place) {
    const int64_t lane = place - base[element / kLanes<S>];
    near = near && lane < 2 * kLanes<S>;
    return static_cast<Index<S>>(lane);
  }
};

template <class S>
inline Vec<Index<S>> load_index(const Index<S>* p) {
  Vec<Index<S>> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Elements from[at] of a row that goes on for two vectors.
template <bool kNear, class S>
inline Vec<S> pick(const S* from, Vec<Index<S>> at) {
  if constexpr (kNear) {
    return __builtin_shuffle(load(from), load(from + kLanes<S>), at);
  } else {
    Vec<S> v;
    for (int l = 0; l < kLanes<S>; ++l) v[l] = from[at[l]];
    return v;
  }
}

// A call's cut into tasks: `pixels` columns and `band` rows of one plane.
struct Cut {
  int64_t planes, rows, columns, pixels, tiles, band, bands, tasks, grain;

  // element_scale: elements that a task holds of a row, for each pixel of its tile.
  Cut(int64_t planes, int64_t rows, int64_t columns, int64_t element_scale, int64_t lanes,
      int64_t elements)
      : planes(planes), rows(rows), columns(columns) {
    pixels = min(columns, max(kTileElements / element_scale / lanes * lanes, lanes));
    tiles = ceil_div(columns, pixels);
    band = ceil_div(rows, ceil_div(kTasks, planes * tiles));
    band = min(rows, max(band, kMinBand));
    bands = ceil_div(rows, band);
    tasks = planes * bands * tiles;
    grain = task_grain(tasks, elements);
  }
  int64_t plane(int64_t task) const { return task / (bands * tiles); }
  int64_t first_row(int64_t task) const { return task / tiles % bands * band; }
  int64_t last_row(int64_t task) const { return min(rows, first_row(task) + band); }
  int64_t first_column(int64_t task) const { return task % tiles * pixels; }
  int64_t last_column(int64_t task) const { return min(columns, first_column(task) + pixels); }
};

// Where planes and pixels of the two sides lie.
struct Places {
  int64_t k, planes, small_row, small_plane, pitch, large_row;
  const UpsampleShape& s;

  explicit Places(const UpsampleShape& s)
      : k(s.channels_last ? s.c : 1),
        planes(s.channels_last ? s.n : s.n * s.c),
        small_row(s.columns.in * k),
        small_plane(s.rows.in * small_row),
        pitch(s.pixel),
        large_row(s.columns.out * pitch),
        s(s) {}
  int64_t large_plane(int64_t plane) const {
    if (s.channels_last) return plane * s.image;
    return plane / s.c * s.image + plane % s.c * s.rows.out * s.columns.out;
  }
  int64_t elements() const { return s.n * s.c * s.rows.out * s.columns.out; }

  // body(offset in the wide row, offset in a dense one, length) for each run of neighbours.
  template <class Body>
  void for_each_run(int64_t pixels, Body body) const {
    if (pitch == k) return body(int64_t{0}, int64_t{0}, pixels * k);
    for (int64_t p = 0; p < pixels; ++p) body(p * pitch, p * k, k);
  }
};

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
