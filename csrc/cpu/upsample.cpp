// upsample on the CPU.
//
// Data movement: forward reads x once and writes y; backward reads dy once and writes dx. Weights
// are separable, so either direction has two steps, with a few rows between them in the cache:
//   forward   an input row is stretched once to the output's width, into a ring of two rows; each
//             output row blends the two.
//   backward  the output rows made of an input row are added up, in the output's width; the sum is
//             then gathered into the input row.
// An image is `planes` of rows of pixels of k elements: k = 1 in NCHW, k = c in channels_last.
// Where k is shorter than a vector, the step along a row picks its elements by shuffles of
// neighbouring vectors, with tables made once a call; else it runs over each pixel's channels. A
// task is a band of rows, in a tile of columns, of a plane. Tasks share nothing they write.
#include "upsample.h"

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/spans.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kTileElements = 4096;  // of a row: two rows of float fill 32 KiB
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

  AxisTable(const Axis& axis, Sampling sampling)
      : in(axis.in),
        out(axis.out),
        linear(Sampler<S>(axis, sampling).linear),
        sources(out),
        begin(in),
        end(in),
        offset(in),
        shares(2 * out) {
    const Sampler<S> sampler(axis, sampling);
    for (int64_t o = 0; o < out; ++o) sources[o] = sampler.at(static_cast<int32_t>(o));
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
};

// Picks single elements along a row: lane l of block b is element base[b] + at[b * lanes + l] of
// it.
template <class S>
struct Picks {
  Scratch<int64_t> base;
  Scratch<Index<S>> at;
  bool near = true;  // every block's elements lie within two vectors

  explicit Picks(int64_t elements)
      : base(ceil_div(elements, kLanes<S>)), at(ceil_div(elements, kLanes<S>) * kLanes<S>) {}

  // Elements come in order; their places fall by less than a pixel of k elements, if at all.
  void set(int64_t element, int64_t place, int64_t k) {
    int64_t& from = base[element / kLanes<S>];
    if (element % kLanes<S> == 0) from = place / k * k;
    at[element] = static_cast<Index<S>>(place - from);
    near = near && place - from < 2 * kLanes<S>;
  }

  // row begins with the row's element `origin`.
  template <bool kNear>
  Vec<S> get(const S* row, int64_t origin, int64_t block) const {
    Vec<Index<S>> mask;
    std::memcpy(&mask, at.get() + block * kLanes<S>, sizeof mask);
    const S* from = row + (base[block] - origin);
    if constexpr (kNear) {
      return __builtin_shuffle(load(from), load(from + kLanes<S>), mask);
    } else {
      Vec<S> v;
      for (int l = 0; l < kLanes<S>; ++l) v[l] = from[mask[l]];
      return v;
    }
  }
};

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

// ---- forward -----------------------------------------------------------------------------------

// Everything that the tasks of one call share.
template <class T>
struct Fwd {
  using S = Acc<T>;
  const Places places;
  const AxisTable<S> rows, columns;
  const Cut cut;
  const bool by_lanes;
  Picks<S> low, high;
  Scratch<S> weight;  // in step with low and high
  const T* x;
  T* y;

  explicit Fwd(const UpsampleFwdParams& p)
      : places(p.shape),
        rows(p.shape.rows, p.shape.sampling),
        columns(p.shape.columns, p.shape.sampling),
        cut(places.planes, rows.out, columns.out, places.k, kLanes<S>, places.elements()),
        by_lanes(places.k < kLanes<S>),
        low(by_lanes ? columns.out * places.k : 0),
        high(by_lanes ? columns.out * places.k : 0),
        weight(by_lanes ? ceil_div(columns.out * places.k, kLanes<S>) * kLanes<S> : 0),
        x(static_cast<const T*>(p.x)),
        y(static_cast<T*>(p.y) + p.c_skip * (p.shape.channels_last ? 1 : rows.out * columns.out)) {
    for (int64_t o = 0; by_lanes && o < columns.out; ++o) {
      for (int64_t j = 0; j < places.k; ++j) {
        const int64_t e = o * places.k + j;
        low.set(e, columns.sources[o].index * places.k + j, places.k);
        high.set(e, columns.sources[o].next * places.k + j, places.k);
        weight[e] = columns.sources[o].weight;
      }
    }
  }

  // Neighbours of an input row that columns [first, last) are made of.
  int64_t source_elements(int64_t first, int64_t last) const {
    return (columns.sources[last - 1].next + 1 - columns.sources[first].index) * places.k;
  }

  // Columns [first, last) of an input row, stretched to the output's width.
  template <bool kNear>
  void stretch_lanes(const T* row, S* line, S* out, int64_t first, int64_t last) const {
    const int64_t from = columns.sources[first].index * places.k;
    const int64_t length = source_elements(first, last);
    for_each_vector<S>(
        length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
          store(line + i, load(row + from + i, count));
        });
    const int64_t blocks = ceil_div(last * places.k, kLanes<S>);
    for (int64_t b = first * places.k / kLanes<S>; b < blocks; ++b, out += kLanes<S>) {
      Vec<S> v = low.template get<kNear>(line, from, b);
      if (columns.linear) {
        const Vec<S> w = load(weight.get() + b * kLanes<S>);
        v = v * (1 - w) + high.template get<kNear>(line, from, b) * w;
      }
      store(out, v);
    }
  }

  void stretch_pixels(const T* row, S* out, int64_t first, int64_t last) const {
    for (int64_t o = first; o < last; ++o, out += places.k) {
      const Source<S>& source = columns.sources[o];
      const T *low = row + source.index * places.k, *high = row + source.next * places.k;
      const Vec<S> w = splat(source.weight), rest = 1 - w;
      for_each_vector<S>(
          places.k, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            Vec<S> v = load(low + i, count);
            if (columns.linear) v = v * rest + load(high + i, count) * w;
            store(out + i, v, count);
          });
    }
  }

  void blend(const S* low, const S* high, S weight, T* out, int64_t pixels) const {
    const Vec<S> w = splat(weight), rest = 1 - w;
    places.for_each_run(pixels, [&](int64_t to, int64_t from, int64_t length) {
      for_each_vector<S>(
          length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
            Vec<S> v = load(low + from + i);
            if (rows.linear) v = v * rest + load(high + from + i) * w;
            store(out + to + i, v, count);
          });
    });
  }

  void run(int64_t task) const {
    const int64_t first = cut.first_column(task), last = cut.last_column(task);
    const int64_t length = ((last - first) * places.k / kLanes<S> + 2) * kLanes<S>;
    Scratch<S> ring(2 * length), line(by_lanes ? source_elements(first, last) + 2 * kLanes<S> : 0);
    const T* plane = x + cut.plane(task) * places.small_plane;
    T* out = y + places.large_plane(cut.plane(task)) + first * places.pitch;
    int64_t held[2] = {-1, -1};
    const auto stretched = [&](int64_t i) {
      S* slot = ring.get() + i % 2 * length;
      if (held[i % 2] != i) {
        const T* row = plane + i * places.small_row;
        if (!by_lanes) {
          stretch_pixels(row, slot, first, last);
        } else if (low.near && high.near) {
          stretch_lanes<true>(row, line.get(), slot, first, last);
        } else {
          stretch_lanes<false>(row, line.get(), slot, first, last);
        }
        held[i % 2] = i;
      }
      return slot;
    };
    for (int64_t o = cut.first_row(task); o < cut.last_row(task); ++o) {
      const Source<S>& source = rows.sources[o];
      const S* low_row = stretched(source.index);
      blend(low_row, stretched(source.next), source.weight, out + o * places.large_row,
            last - first);
    }
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
        rows(p.shape.rows, p.shape.sampling),
        columns(p.shape.columns, p.shape.sampling),
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

  // sum (+)= the kRows rows of dy that follow one another, each times its share.
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

  template <bool kNear>
  void gather_lanes(const S* sum, T* out, int64_t first, int64_t last) const {
    const int64_t from = first * places.k, origin = columns.begin[first] * places.k;
    for_each_vector<S>(
        (last - first) * places.k, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          const Vec<S> counts = load(count.get() + from + i);
          Vec<S> v{};
          for (int64_t t = 0; t < longest; ++t) {
            const Vec<S> term =
                start.template get<kNear>(sum + t * places.k, origin, (from + i) / kLanes<S>) *
                load(share.get() + t * padded + from + i);
            v += splat(static_cast<S>(t)) < counts ? term : Vec<S>{};  // not 0 * inf
          }
          store(out + i, v, lanes);
        });
  }

  void gather_pixels(const S* sum, T* out, int64_t first, int64_t last) const {
    for (int64_t p = first; p < last; ++p, out += places.k) {
      const S* from = sum + (columns.begin[p] - columns.begin[first]) * places.k;
      const S* shares = columns.shares.get() + columns.offset[p];
      const int64_t length = columns.length(p);
      for_each_vector<S>(
          places.k, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
            Vec<S> v{};
            for (int64_t t = 0; t < length; ++t) {
              v += load(from + t * places.k + i, lanes) * splat(shares[t]);
            }
            store(out + i, v, lanes);
          });
    }
  }

  void run(int64_t task) const {
    const int64_t first = cut.first_column(task), last = cut.last_column(task);
    const int64_t begin = columns.begin[first], end = columns.end[last - 1];
    // Behind the sum, what the picks of the last elements read and throw away.
    Scratch<S> sum((end - begin + longest) * places.k + 3 * kLanes<S>);
    const T* from = dy + places.large_plane(cut.plane(task)) + begin * places.pitch;
    T* plane = dx + cut.plane(task) * places.small_plane + first * places.k;
    for (int64_t i = cut.first_row(task); i < cut.last_row(task); ++i) {
      const S* shares = rows.shares.get() + rows.offset[i];
      const int64_t length = rows.length(i);
      const T* row = from + rows.begin[i] * places.large_row;
      int64_t r = 0;
      for (; r + 4 <= length; r += 4) {
        add_rows<4>(row + r * places.large_row, shares + r, sum.get(), end - begin, r > 0);
      }
      for (; r < length; ++r) {
        add_rows<1>(row + r * places.large_row, shares + r, sum.get(), end - begin, r > 0);
      }
      if (length == 0)
        std::memset(sum.get(), 0, static_cast<size_t>(end - begin) * places.k * sizeof(S));
      T* out = plane + i * places.small_row;
      if (!by_lanes) {
        gather_pixels(sum.get(), out, first, last);
      } else if (start.near) {
        gather_lanes<true>(sum.get(), out, first, last);
      } else {
        gather_lanes<false>(sum.get(), out, first, last);
      }
    }
  }
};

template <class Call>
void run_tasks(const Call& call) {
  const auto run = [&](int64_t task) { call.run(task); };
  parallel_for(call.cut.tasks, call.cut.grain, run);
}

}  // namespace

void upsample_fwd_cpu(const UpsampleFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.c_skip > 0) copy_skip(p, sizeof(T));
    if (p.shape.c > 0) run_tasks(Fwd<T>(p));
  });
}

void upsample_bwd_cpu(const UpsampleBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) { run_tasks(Bwd<decltype(tag)>(p)); });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
