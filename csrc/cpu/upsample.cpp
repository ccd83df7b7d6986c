// upsample on the CPU.
//
// Data movement: forward reads x once and writes y; backward reads dy once and writes dx. Weights
// are separable, so either direction has two steps, with a few rows between them in the cache:
//   forward   each input row is stretched once to the output's width; an output row blends two.
//   backward  the output rows made of an input row are added up, in the output's width; the sum is
//             then gathered into the input row.
// Both steps take kGroup rows at a time: tables are loaded once for all of them, and what the first
// step has stored has reached the cache when the second one loads it at other offsets.
// An image is `planes` of rows of pixels of k elements: k = 1 in NCHW, k = c in channels_last.
// Where k is shorter than a vector, the step along a row picks its elements by shuffles of
// neighbouring vectors, with tables made once a call; else it runs over each pixel's channels. A
// task is a band of rows, in a tile of columns, of a plane. Tasks share nothing they write.
#include "upsample.h"

#include "common/dispatch.h"
#include "common/parallel.h"
#include "cpu/upsample_tables.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int kGroup = 4;

// Of an output that is stored around the cache: half of the machine's, so that another half is left
// for what a smaller output's reader finds there.
constexpr int64_t kStreamBytes = 1 << 24;

// ---- forward -----------------------------------------------------------------------------------

// Everything that the tasks of one call share.
template <class T>
struct Fwd {
  using S = Acc<T>;
  const Places places;
  const AxisTable<S> rows, columns;
  const Cut cut;
  const bool by_lanes;
  Picks<S> low;
  Scratch<Index<S>> high;  // relative to low's base
  Scratch<S> weight;       // in step with low and high
  const T* x;
  T* y;

  explicit Fwd(const UpsampleFwdParams& p)
      : places(p.shape),
        rows(p.shape.rows, p.shape.sampling, false),
        columns(p.shape.columns, p.shape.sampling, false),
        cut(places.planes, rows.out, columns.out, places.k, kLanes<S>, places.elements()),
        by_lanes(places.k < kLanes<S>),
        low(by_lanes ? columns.out * places.k : 0),
        high(by_lanes ? columns.out * places.k + kLanes<S> : 0),
        weight(by_lanes ? columns.out * places.k + kLanes<S> : 0),
        x(static_cast<const T*>(p.x)),
        y(static_cast<T*>(p.y) + p.c_skip * (p.shape.channels_last ? 1 : rows.out * columns.out)) {
    for (int64_t o = 0; by_lanes && o < columns.out; ++o) {
      for (int64_t j = 0; j < places.k; ++j) {
        const int64_t e = o * places.k + j;
        low.set(e, columns.sources[o].index * places.k + j, places.k);
        high[e] = low.relative(e, columns.sources[o].next * places.k + j);
        weight[e] = columns.sources[o].weight;
      }
    }
  }

  // Stretched rows. A group needs at most two for each of its rows; rows come in order, so those
  // that are there already are the newest two.
  struct Held {
    static constexpr int kSlots = 2 * kGroup + 2;
    int64_t length;  // elements of a slot
    Scratch<S> slots, lines;
    int64_t newest_row, row_before;
    int newest = 0;
    int wanted = 0;  // rows to be stretched now, and their slots
    int64_t wanted_row[2 * kGroup];
    S* wanted_slot[2 * kGroup];

    Held(int64_t length, int64_t lines) : length(length), slots(kSlots * length), lines(lines) {}
    void clear() { newest_row = row_before = -1; }
    const S* find(int64_t i) {
      if (i == newest_row) return slots.get() + newest * length;
      if (i == row_before) return slots.get() + (newest + kSlots - 1) % kSlots * length;
      newest = (newest + 1) % kSlots;
      row_before = newest_row;
      newest_row = i;
      wanted_row[wanted] = i;
      return wanted_slot[wanted++] = slots.get() + newest * length;
    }
  };

  // Neighbours of an input row that columns [first, last) are made of.
  int64_t source_elements(int64_t first, int64_t last) const {
    return (columns.sources[last - 1].next + 1 - columns.sources[first].index) * places.k;
  }

  // Columns [first, last) of the wanted rows, stretched to the output's width.
  template <bool kNear, bool kLinear>
  void stretch_lanes(const T* plane, Held& held, int64_t first, int64_t last) const {
    const int64_t from = columns.sources[first].index * places.k;
    const int64_t length = source_elements(first, last), line = length + 3 * kLanes<S>;
    for (int r = 0; r < held.wanted; ++r) {
      const T* row = plane + held.wanted_row[r] * places.small_row + from;
      for_each_vector<S>(
          length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            store(held.lines.get() + r * line + i, load(row + i, count));
          });
    }
    const int64_t blocks = ceil_div(last * places.k, kLanes<S>);
    int64_t to = 0;
    for (int64_t b = first * places.k / kLanes<S>; b < blocks; ++b, to += kLanes<S>) {
      const auto low_at = load_index<S>(low.at.get() + b * kLanes<S>);
      const auto high_at = load_index<S>(high.get() + b * kLanes<S>);
      const Vec<S> w = load(weight.get() + b * kLanes<S>), rest = 1 - w;
      const S* at = held.lines.get() + (low.base[b] - from);
      for (int r = 0; r < held.wanted; ++r, at += line) {
        Vec<S> v = pick<kNear>(at, low_at);
        if constexpr (kLinear) v = v * rest + pick<kNear>(at, high_at) * w;
        store(held.wanted_slot[r] + to, v);
      }
    }
  }

  template <bool kLinear>
  void stretch_pixels(const T* plane, const Held& held, int64_t first, int64_t last) const {
    for (int r = 0; r < held.wanted; ++r) {
      const T* row = plane + held.wanted_row[r] * places.small_row;
      S* out = held.wanted_slot[r];
      for (int64_t o = first; o < last; ++o, out += places.k) {
        const Source<S>& source = columns.sources[o];
        const T *low = row + source.index * places.k, *high = row + source.next * places.k;
        const Vec<S> w = splat(source.weight), rest = 1 - w;
        for_each_vector<S>(
            places.k, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
              Vec<S> v = load(low + i, count);
              if constexpr (kLinear) v = v * rest + load(high + i, count) * w;
              store(out + i, v, count);
            });
      }
    }
  }

  template <bool kLinear, bool kStream>
  void blend(const S* low, const S* high, S weight, T* out, int64_t pixels) const {
    const Vec<S> w = splat(weight), rest = 1 - w;
    places.for_each_run(pixels, [&](int64_t to, int64_t from, int64_t length) {
      for_each_vector<S>(
          length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            Vec<S> v = load(low + from + i);
            if constexpr (kLinear) v = v * rest + load(high + from + i) * w;
            if constexpr (kStream) {
              stream(out + to + i, v);
            } else {
              store(out + to + i, v, count);
            }
          });
    });
  }

  // Whether y bypasses the cache, which it would leave before anyone reads it. Every store must
  // then be a whole vector, on its own boundary.
  bool streams() const {
    const int64_t bytes = sizeof(T), vector = kLanes<S> * bytes;
    return places.elements() * bytes >= kStreamBytes && places.pitch == places.k &&
           places.large_row * bytes % vector == 0 && places.s.image * bytes % vector == 0 &&
           cut.pixels * places.k % kLanes<S> == 0 && reinterpret_cast<uintptr_t>(y) % vector == 0;
  }

  Held new_held() const {
    int64_t line = 0;  // the longest of a tile
    for (int64_t tile = 0; tile < cut.tiles; ++tile) {
      line = max(line, source_elements(cut.first_column(tile), cut.last_column(tile)));
    }
    return Held((cut.pixels * places.k / kLanes<S> + 2) * kLanes<S>,
                by_lanes ? 2 * kGroup * (line + 3 * kLanes<S>) : 0);
  }

  template <bool kStream>
  void run(int64_t task, Held& held) const {
    const int64_t first = cut.first_column(task), last = cut.last_column(task);
    held.clear();
    const T* plane = x + cut.plane(task) * places.small_plane;
    T* out = y + places.large_plane(cut.plane(task)) + first * places.pitch;
    const int64_t end = cut.last_row(task);
    for (int64_t o = cut.first_row(task); o < end; o += kGroup) {
      const int64_t group = min(kGroup, end - o);
      const S *low_row[kGroup], *high_row[kGroup];
      held.wanted = 0;
      for (int64_t r = 0; r < group; ++r) {
        low_row[r] = held.find(rows.sources[o + r].index);
        high_row[r] = held.find(rows.sources[o + r].next);
      }
      dispatch_bool(columns.linear, [&](auto linear) {
        constexpr bool kLinear = decltype(linear)::value;
        if (!by_lanes) {
          stretch_pixels<kLinear>(plane, held, first, last);
        } else if (low.near) {
          stretch_lanes<true, kLinear>(plane, held, first, last);
        } else {
          stretch_lanes<false, kLinear>(plane, held, first, last);
        }
      });
      dispatch_bool(rows.linear, [&](auto linear) {
        for (int64_t r = 0; r < group; ++r) {
          blend<decltype(linear)::value, kStream>(low_row[r], high_row[r],
                                                  rows.sources[o + r].weight,
                                                  out + (o + r) * places.large_row, last - first);
        }
      });
    }
    if constexpr (kStream) stream_end();
  }
};

// skip's channels, to the front of y's.
void copy_skip(const UpsampleFwdParams& p, int64_t element_bytes) {
  const UpsampleShape& s = p.shape;
  const int64_t hw = s.rows.out * s.columns.out;
  const int64_t runs = s.channels_last ? s.n * hw : s.n;  // of neighbouring elements, in both
  const int64_t run = p.c_skip * (s.channels_last ? 1 : hw) * element_bytes;
  const int64_t step = (s.channels_last ? s.pixel : s.image) * element_bytes;
  const int64_t piece = min(run, kChunkBytes);
  const int64_t pieces = ceil_div(run, piece), together = max(1, kChunkBytes / run);
  const auto copy = [&](int64_t task) {
    const int64_t first = task / pieces * together, at = task % pieces * piece;
    for (int64_t r = first; r < min(runs, first + together); ++r) {
      std::memcpy(static_cast<char*>(p.y) + r * step + at,
                  static_cast<const char*>(p.skip) + r * run + at,
                  static_cast<size_t>(min(piece, run - at)));
    }
  };
  parallel_for(ceil_div(runs, together) * pieces, 4, copy);
}

// ---- backward ----------------------------------------------------------------------------------

template <class T>
struct Bwd {
  using S = Acc<T>;
  const Places places;
  const AxisTable<S> rows, columns;
  const Cut cut;
  const bool by_lanes;
  int64_t longest = 0;  // outputs that an input column is in
  Picks<S> start;       // of each element's outputs
  Scratch<S> count;     // of its outputs; in step with start
  Scratch<S> share;     // [longest] of such arrays
  int64_t padded;
  const T* dy;
  T* dx;

  static int64_t longest_of(const AxisTable<S>& table) {
    int64_t longest = 0;
    for (int64_t i = 0; i < table.in; ++i) longest = max(longest, table.length(i));
    return longest;
  }

  explicit Bwd(const UpsampleBwdParams& p)
      : places(p.shape),
        rows(p.shape.rows, p.shape.sampling, true),
        columns(p.shape.columns, p.shape.sampling, true),
        cut(places.planes, rows.in, columns.in, places.k * ceil_div(columns.out, columns.in),
            kLanes<S>, places.elements()),
        by_lanes(places.k < kLanes<S>),
        longest(longest_of(columns)),
        start(by_lanes ? places.small_row : 0),
        count(by_lanes ? places.small_row + kLanes<S> : 0),
        share(by_lanes ? longest * (places.small_row + kLanes<S>) : 0),
        padded(places.small_row + kLanes<S>),
        dy(static_cast<const T*>(p.dy)),
        dx(static_cast<T*>(p.dx)) {
    for (int64_t i = 0; by_lanes && i < columns.in; ++i) {
      for (int64_t j = 0; j < places.k; ++j) {
        const int64_t e = i * places.k + j;
        start.set(e, columns.begin[i] * places.k + j, places.k);
        count[e] = static_cast<S>(columns.length(i));
        for (int64_t t = 0; t < columns.length(i); ++t) {
          share[t * padded + e] = columns.shares[columns.offset[i] + t];
        }
      }
    }
  }

  // sum (+)= kRows rows of dy that follow one another, each times its share.
  template <int kRows>
  void add_rows(const T* from, const S* shares, S* sum, int64_t pixels, bool add) const {
    places.for_each_run(pixels, [&](int64_t at, int64_t to, int64_t length) {
      for_each_vector<S>(
          length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            Vec<S> v = add ? load(sum + to + i, count) : Vec<S>{};
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              v += load(from + r * places.large_row + at + i, count) * splat(shares[r]);
            }
            store(sum + to + i, v, count);
          });
    });
  }

  // sum = the rows of dy that input row i is in; from: dy's row 0.
  void add_all(const T* from, int64_t i, S* sum, int64_t pixels) const {
    const S* shares = rows.shares.get() + rows.offset[i];
    const int64_t length = rows.length(i);
    if (length == 0) std::memset(sum, 0, static_cast<size_t>(pixels * places.k) * sizeof(S));
    for (int64_t r = 0; r < length; r += 4) {
      const T* row = from + (rows.begin[i] + r) * places.large_row;
      switch (length - r) {
        case 1:
          return add_rows<1>(row, shares + r, sum, pixels, r > 0);
        case 2:
          return add_rows<2>(row, shares + r, sum, pixels, r > 0);
        case 3:
          return add_rows<3>(row, shares + r, sum, pixels, r > 0);
        default:
          add_rows<4>(row, shares + r, sum, pixels, r > 0);
      }
    }
  }

  // Input columns [first, last) of kRows rows, from their sums, which lie `step` apart.
  template <bool kNear, int kRows>
  void gather_lanes(const S* sums, int64_t step, T* out, int64_t first, int64_t last) const {
    const int64_t from = first * places.k, origin = columns.begin[first] * places.k;
    for_each_vector<S>(
        (last - first) * places.k, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          const int64_t b = (from + i) / kLanes<S>;
          const auto at = load_index<S>(start.at.get() + b * kLanes<S>);
          const Vec<S> counts = load(count.get() + from + i);
          const S* sum = sums + (start.base[b] - origin);
          Vec<S> v[kRows] = {};
          for (int64_t t = 0; t < longest; ++t, sum += places.k) {
            const Vec<S> w = load(share.get() + t * padded + from + i);
            const auto there = splat(static_cast<S>(t)) < counts;
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {  // selected, since 0 * inf is not 0
              v[r] += there ? pick<kNear>(sum + r * step, at) * w : Vec<S>{};
            }
          }
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) store(out + r * places.small_row + i, v[r], lanes);
        });
  }

  // kLength: outputs that a column is in; 0 where that is known at run time only.
  template <int kLength>
  void gather_pixel(const S* sum, const S* shares, int64_t length, T* out) const {
    for_each_vector<S>(
        places.k, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          Vec<S> v{};
          const int64_t terms = kLength > 0 ? kLength : length;
#pragma GCC unroll 4
          for (int64_t t = 0; t < terms; ++t) v += load(sum + t * places.k + i) * splat(shares[t]);
          store(out + i, v, lanes);
        });
  }

  void gather_pixels(const S* sum, T* out, int64_t first, int64_t last) const {
    for (int64_t p = first; p < last; ++p, out += places.k) {
      const S* from = sum + (columns.begin[p] - columns.begin[first]) * places.k;
      const S* shares = columns.shares.get() + columns.offset[p];
      const int64_t length = columns.length(p);
      if (length == 4) {  // bilinear, doubled
        gather_pixel<4>(from, shares, length, out);
      } else if (length == 2) {  // nearest, doubled
        gather_pixel<2>(from, shares, length, out);
      } else {
        gather_pixel<0>(from, shares, length, out);
      }
    }
  }

  template <bool kNear>
  void gather_group(const S* sums, int64_t step, int64_t group, T* out, int64_t first,
                    int64_t last) const {
    if (group == kGroup) return gather_lanes<kNear, kGroup>(sums, step, out, first, last);
    for (int64_t r = 0; r < group; ++r) {
      gather_lanes<kNear, 1>(sums + r * step, step, out + r * places.small_row, first, last);
    }
  }

  // Elements of a group's sum: the widest tile's, and behind it what the picks of the last elements
  // read and throw away.
  int64_t sum_elements() const {
    int64_t pixels = 0;
    for (int64_t tile = 0; tile < cut.tiles; ++tile) {
      pixels = max(pixels,
                   columns.end[cut.last_column(tile) - 1] - columns.begin[cut.first_column(tile)]);
    }
    return ((pixels + longest) * places.k / kLanes<S> + 4) * kLanes<S>;
  }

  // sums: kGroup times `step` elements.
  void run(int64_t task, S* sums, int64_t step) const {
    const int64_t first = cut.first_column(task), last = cut.last_column(task);
    const int64_t begin = columns.begin[first], pixels = columns.end[last - 1] - begin;
    const T* from = dy + places.large_plane(cut.plane(task)) + begin * places.pitch;
    T* plane = dx + cut.plane(task) * places.small_plane + first * places.k;
    const int64_t end = cut.last_row(task);
    for (int64_t i = cut.first_row(task); i < end; i += kGroup) {
      const int64_t group = min(kGroup, end - i);
      for (int64_t r = 0; r < group; ++r) add_all(from, i + r, sums + r * step, pixels);
      T* out = plane + i * places.small_row;
      if (!by_lanes) {
        for (int64_t r = 0; r < group; ++r) {
          gather_pixels(sums + r * step, out + r * places.small_row, first, last);
        }
      } else if (start.near) {
        gather_group<true>(sums, step, group, out, first, last);
      } else {
        gather_group<false>(sums, step, group, out, first, last);
      }
    }
  }
};

}  // namespace

void upsample_fwd_cpu(const UpsampleFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.c_skip > 0) copy_skip(p, sizeof(T));
    if (p.shape.c == 0) return;
    const Fwd<T> fwd(p);
    dispatch_bool(fwd.streams(), [&](auto streams) {
      parallel_ranges(fwd.cut.tasks, fwd.cut.grain, [&](int64_t begin, int64_t end) {
        auto held = fwd.new_held();
        for (int64_t task = begin; task < end; ++task) {
          fwd.template run<decltype(streams)::value>(task, held);
        }
      });
    });
  });
}

void upsample_bwd_cpu(const UpsampleBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Bwd<T> bwd(p);
    const int64_t step = bwd.sum_elements();
    parallel_ranges(bwd.cut.tasks, bwd.cut.grain, [&](int64_t begin, int64_t end) {
      Scratch<Acc<T>> sums(kGroup * step);
      for (int64_t task = begin; task < end; ++task) bwd.run(task, sums.get(), step);
    });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
