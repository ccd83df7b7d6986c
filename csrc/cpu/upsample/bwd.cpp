// upsample's backward on the CPU: the sums that upsample.cpp describes. The shares of an input
// pixel in its outputs are listed once a call, so no inner loop has coordinate arithmetic; and each
// input pixel is gathered by one task in one order.
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/upsample/tables.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

template <class T>
struct Bwd {
  using S = Acc<T>;
  const Places places;
  const AxisTable<S> rows, columns;
  const Cut cut;
  const bool by_lanes, copied;  // copied: by nearest sampling, in channels_last
  int64_t longest = 0;          // outputs that an input column is in
  Picks<S> start;               // of each element's outputs
  Scratch<S> count;             // of its outputs; in step with start
  Scratch<S> share;             // [longest] of such arrays
  int64_t padded;
  const T* dy;
  T* dx;

  explicit Bwd(const UpsampleBwdParams& p)
      : places(p.shape),
        rows(p.shape.rows, p.shape.sampling, true),
        columns(p.shape.columns, p.shape.sampling, true),
        cut(places.planes, rows.in, columns.in, places.k * ceil_div(columns.out, columns.in),
            kLanes<S>, places.elements()),
        by_lanes(places.k < kLanes<S>),
        copied(!by_lanes && !rows.linear && !columns.linear),
        longest(columns.longest()),
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
              const T* p = from + r * places.large_row + at + i;
              prefetch(p + kRows * places.large_row);
              v += load(p, count) * splat(shares[r]);
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

  // Input row i where every share is 1: straight from dy, whose rows stay in the L1 cache while a
  // row's pixels are gathered. Added up as the two steps would: down a column, then across.
  void gather_copies(const T* from, int64_t i, T* out, int64_t first, int64_t last) const {
    const T* top = from + rows.begin[i] * places.large_row;
    const int64_t down = rows.length(i);
    for (int64_t p = first; p < last; ++p, out += places.k) {
      const T* left = top + (columns.begin[p] - columns.begin[first]) * places.pitch;
      const int64_t across = columns.length(p);
      for_each_vector<S>(
          places.k, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
            Vec<S> v{};
            for (int64_t t = 0; t < across; ++t) {
              const T* at = left + t * places.pitch + j;
              Vec<S> column{};
              for (int64_t r = 0; r < down; ++r, at += places.large_row) {
                prefetch(at + down * places.large_row);
                column += load(at, lanes);
              }
              v += column;
            }
            store(out + j, v, lanes);
          });
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
      T* out = plane + i * places.small_row;
      // Of far more rows than dy has, most are in none: gathered, each would cost a row of dy.
      if (rows.begin[i] == rows.end[i + group - 1]) {
        const auto bytes = static_cast<size_t>((last - first) * places.k) * sizeof(T);
        for (int64_t r = 0; r < group; ++r) std::memset(out + r * places.small_row, 0, bytes);
        continue;
      }
      if (copied) {
        for (int64_t r = 0; r < group; ++r) {
          gather_copies(from, i + r, out + r * places.small_row, first, last);
        }
        continue;
      }
      for (int64_t r = 0; r < group; ++r) add_all(from, i + r, sums + r * step, pixels);
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

void upsample_bwd_cpu(const UpsampleBwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Bwd<T> bwd(p);
    const int64_t step = bwd.sum_elements();
    parallel_ranges(bwd.cut.tasks, bwd.cut.grain, [&](int64_t begin, int64_t end) {
      Scratch<Acc<T>> sums(bwd.copied ? 0 : kGroup * step);
      for (int64_t task = begin; task < end; ++task) bwd.run(task, sums.get(), step);
    });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
