// upsample_taps on the CPU, channels_last.
//
// Data movement: forward reads z once and writes y; backward reads dy once and writes dz. Beyond
// that the neighbouring rows of a task come from the L2 cache.
//   forward   for each row of y the rows of z that it is made of, at most 6 (3 taps, 2 sources
//             each), are added up for each of the 3 taps along a row; then their pixels.
//   backward  for each row of z the rows of dy that it is in are added up for each of the 3 taps
//             across rows; then their pixels.
// A task is a band of rows, in a tile of columns, of some channels of an image: the sums between
// the two steps stay in the L1 cache. Tasks share nothing that they write.
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/upsample/tables.h"
#include "upsample_taps.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kChannels = 128;  // of a task, at most
constexpr int64_t kSums = 8192;     // numbers between the two steps
constexpr int64_t kBand = 16;       // rows of y in a task, at least

// Terms of sums: the places of each, from a common start, and its shares.
template <class S>
class Terms {
 public:
  Terms(int64_t sums, int64_t most)
      : most_(most), count_(sums), at_(sums * most), share_(sums * most) {}

  void clear(int64_t sum) { count_[sum] = 0; }
  void add(int64_t sum, int64_t at, S share) {
    if (share == S(0)) return;
    const int64_t k = sum * most_ + count_[sum]++;
    at_[k] = at;
    share_[k] = share;
  }
  int64_t count(int64_t sum) const { return count_[sum]; }
  const int64_t* at(int64_t sum) const { return at_.get() + sum * most_; }
  const S* share(int64_t sum) const { return share_.get() + sum * most_; }

 private:
  int64_t most_;
  Scratch<int64_t> count_, at_;
  Scratch<S> share_;
};

// to[i] = sum over terms of share * from[at + i], for `runs` runs of `length` elements.
template <class T, class U, int kCount>
inline void sum_of(const Terms<Acc<T>>& terms, int64_t sum, const T* from, int64_t from_step, U* to,
                   int64_t to_step, int64_t length, int64_t runs) {
  using S = Acc<T>;
  const T* at[kCount];
  Vec<S> share[kCount];
  for (int k = 0; k < kCount; ++k) {
    at[k] = from + terms.at(sum)[k];
    share[k] = splat(terms.share(sum)[k]);
  }
  for (int64_t run = 0; run < runs; ++run, to += to_step) {
    const int64_t offset = run * from_step;
    for_each_vector<S>(
        length, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          Vec<S> total = load(at[0] + offset + i, lanes) * share[0];
#pragma GCC unroll 6
          for (int k = 1; k < kCount; ++k) total += load(at[k] + offset + i, lanes) * share[k];
          store(to + i, total, lanes);
        });
  }
}

template <class T, class U>
inline void sum_of_any(const Terms<Acc<T>>& terms, int64_t sum, const T* from, int64_t from_step,
                       U* to, int64_t to_step, int64_t length, int64_t runs) {
  using S = Acc<T>;
  for (int64_t run = 0; run < runs; ++run, from += from_step, to += to_step) {
    for_each_vector<S>(
        length, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
          Vec<S> total{};
          for (int64_t k = 0; k < terms.count(sum); ++k) {
            total += load(from + terms.at(sum)[k] + i, lanes) * splat(terms.share(sum)[k]);
          }
          store(to + i, total, lanes);
        });
  }
}

template <class T, class U>
inline void add_up(const Terms<Acc<T>>& terms, int64_t sum, const T* from, int64_t from_step, U* to,
                   int64_t to_step, int64_t length, int64_t runs) {
  switch (terms.count(sum)) {
    case 6:
      return sum_of<T, U, 6>(terms, sum, from, from_step, to, to_step, length, runs);
    case 4:
      return sum_of<T, U, 4>(terms, sum, from, from_step, to, to_step, length, runs);
    case 3:
      return sum_of<T, U, 3>(terms, sum, from, from_step, to, to_step, length, runs);
    default:
      return sum_of_any(terms, sum, from, from_step, to, to_step, length, runs);
  }
}

template <class T>
struct Taps {
  using S = Acc<T>;
  const UpsampleTapsParams& p;
  const AxisTable<S> rows, columns;
  // Forward: the columns of z that y is made of, all but in smaller images; the end of each one's
  // run of neighbours; and of each column of y the place of its first source among them.
  const Scratch<int64_t> used, run_end, place;
  const int64_t channels, blocks;  // of a task; a pixel's tasks
  int64_t pixels, tiles;           // columns of a task, on the side that is written
  int64_t band, bands, tasks, grain;
  int64_t longest = 0;  // pixels that a tile needs of the other side

  Taps(const UpsampleTapsParams& p, bool backward)
      : p(p),
        rows(p.rows, p.sampling, backward),
        columns(p.columns, p.sampling, backward),
        used(backward ? 0 : min(p.columns.in, 2 * p.columns.out)),
        run_end(backward ? 0 : min(p.columns.in, 2 * p.columns.out)),
        place(backward ? 0 : p.columns.out),
        channels(min(p.c, kChannels)),
        blocks(ceil_div(p.c, channels)) {
    if (!backward) find_used();
    const int64_t height = backward ? p.rows.in : p.rows.out;
    const int64_t width = backward ? p.columns.in : p.columns.out;
    const int64_t other = backward ? p.columns.out : min(p.columns.in, 2 * width);
    const int64_t held = max(8, kSums / (kTapSide * channels));  // pixels of the other side
    pixels = min(width, max(1, held * width / other));
    tiles = ceil_div(width, pixels);
    const int64_t least = backward ? max(1, kBand * p.rows.in / p.rows.out) : kBand;
    band = min(height, max(least, ceil_div(height, ceil_div(kTasks, p.n * tiles * blocks))));
    bands = ceil_div(height, band);
    tasks = p.n * bands * tiles * blocks;
    grain = task_grain(tasks, p.n * p.c * p.rows.out * p.columns.out);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int64_t first, last;
      reach(tile, backward, first, last);
      longest = max(longest, last - first);
    }
  }

  void find_used() {
    int64_t count = 0;
    for (int64_t at = 0; at < columns.out; ++at) {
      const int64_t index = columns.sources[at].index, next = columns.sources[at].next;
      if (count == 0 || index > used[count - 1]) used[count++] = index;
      if (next > used[count - 1]) used[count++] = next;
      place[at] = count - 1 - (used[count - 1] - index);
    }
    for (int64_t u = count - 1; u >= 0; --u) {
      const bool ends = u + 1 == count || used[u + 1] > used[u] + 1;
      run_end[u] = ends ? u + 1 : run_end[u + 1];
    }
  }

  // Columns of the other side that a tile needs, forward by their places in `used`.
  void reach(int64_t tile, bool backward, int64_t& first, int64_t& last) const {
    const int64_t begin = tile * pixels,
                  end = min(begin + pixels, backward ? columns.in : columns.out);
    if (backward) {
      first = max(0, columns.begin[begin] - 1);
      last = min(columns.out, columns.end[end - 1] + 1);
    } else {
      const int64_t low = max(0, begin - 1), high = min(columns.out - 1, end);
      const Source<S>& source = columns.sources[high];
      first = place[low];
      last = place[high] + source.next - source.index + 1;
    }
  }

  struct Task {
    int64_t image, first_row, last_row, first, last, from, to, channel, channels;
  };

  Task task_of(int64_t task, bool backward) const {
    Task t;
    t.channel = task % blocks * channels;
    t.channels = min(channels, p.c - t.channel);
    const int64_t tile = task / blocks % tiles, b = task / (blocks * tiles) % bands;
    t.image = task / (blocks * tiles * bands);
    t.first_row = b * band;
    t.last_row = min(t.first_row + band, backward ? rows.in : rows.out);
    t.first = tile * pixels;
    t.last = min(t.first + pixels, backward ? columns.in : columns.out);
    reach(tile, backward, t.from, t.to);
    return t;
  }

  void fwd(int64_t begin, int64_t end) const {
    const T* z = static_cast<const T*>(p.from);
    T* y = static_cast<T*>(p.to);
    const int64_t pixel = kTaps * p.c, row_of_z = columns.in * pixel;  // elements
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    Terms<S> across(1, 2 * kTapSide), along(pixels, 2 * kTapSide);
    Scratch<S> sums(kTapSide * longest * channels + kLanes<S>, Fill::kNothing);
    for (int64_t task = begin; task < end; ++task) {
      const Task t = task_of(task, false);
      const int64_t length = t.to - t.from;
      for (int64_t q = t.first; q < t.last; ++q) {
        along.clear(q - t.first);
        for (int64_t b = 0; b < kTapSide; ++b) {
          const int64_t at = q + b - 1;
          if (at < 0 || at >= columns.out) continue;
          const Source<S>& source = columns.sources[at];
          const int64_t first = b * length - t.from + place[at];
          along.add(q - t.first, first * t.channels, 1 - source.weight);
          along.add(q - t.first, (first + source.next - source.index) * t.channels, source.weight);
        }
      }
      const T* from = z + t.image * rows.in * row_of_z + used[t.from] * pixel + t.channel;
      // A row of y prefetches its share of the row of z that is needed next: short runs, which the
      // processor's prefetchers do not see coming. 4x64x256x256 bfloat16 from 128x128 took 13 ms
      // without and 7 with it, on a 2-core AMD EPYC. In the loop itself: see prefetch().
      const int64_t width = t.last - t.first, taps = length * kTaps;
      const int64_t most = run_end[t.from] >= t.to ? rows.in * taps : 0;  // one run
      const int64_t each = ceil_div(taps * rows.in, rows.out * width);
      int64_t fetched = (rows.sources[min(rows.out - 1, t.first_row + 1)].next + 1) * taps;
      for (int64_t row = t.first_row; row < t.last_row; ++row) {
        across.clear(0);
        for (int64_t a = 0; a < kTapSide; ++a) {
          const int64_t at = row + a - 1;
          if (at < 0 || at >= rows.out) continue;
          const Source<S>& source = rows.sources[at];
          across.add(0, source.index * row_of_z + a * kTapSide * p.c, 1 - source.weight);
          across.add(0, source.next * row_of_z + a * kTapSide * p.c, source.weight);
        }
        for (int64_t b = 0; b < kTapSide; ++b) {
          for (int64_t u = t.from, stop; u < t.to; u = stop) {
            stop = min(t.to, run_end[u]);
            add_up<T, S>(across, 0, from + (used[u] - used[t.from]) * pixel + b * p.c, pixel,
                         sums.get() + (b * length + u - t.from) * t.channels, t.channels,
                         t.channels, stop - u);
          }
        }
        T* out = y + ((t.image * rows.out + row) * columns.out + t.first) * p.c + t.channel;
        for (int64_t q = 0; q < width; ++q, out += p.c) {
          for (const int64_t until = min(most, fetched + each); fetched < until; ++fetched) {
            const T* run = from + fetched / taps * row_of_z + fetched % taps * p.c;
            for (int64_t i = 0; i < t.channels; i += kLine) prefetch(run + i);
          }
          add_up<S, T>(along, q, sums.get(), 0, out, 0, t.channels, 1);
        }
      }
    }
  }

  void bwd(int64_t begin, int64_t end) const {
    const T* dy = static_cast<const T*>(p.from);
    T* dz = static_cast<T*>(p.to);
    const int64_t row_of_dy = columns.out * p.c;
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    Terms<S> across(1, rows.longest()), along(kTapSide * pixels, columns.longest());
    Scratch<S> sums(kTapSide * longest * channels + kLanes<S>, Fill::kNothing);
    for (int64_t task = begin; task < end; ++task) {
      const Task t = task_of(task, true);
      const int64_t length = t.to - t.from;
      for (int64_t j = t.first; j < t.last; ++j) {
        for (int64_t b = 0; b < kTapSide; ++b) {
          const int64_t sum = (j - t.first) * kTapSide + b;
          along.clear(sum);
          for (int64_t v = columns.begin[j]; v < columns.end[j]; ++v) {
            const int64_t at = v - b + 1;
            if (at < 0 || at >= columns.out) continue;
            along.add(sum, (at - t.from) * t.channels,
                      columns.shares[columns.offset[j] + v - columns.begin[j]]);
          }
        }
      }
      const T* from = dy + t.image * rows.out * row_of_dy + t.from * p.c + t.channel;
      // As in fwd.
      const int64_t width = t.last - t.first, most_runs = rows.out * length;
      const int64_t each = ceil_div(length * rows.out, rows.in * width);
      int64_t fetched = min(rows.out, rows.end[t.first_row] + 1) * length;
      for (int64_t row = t.first_row; row < t.last_row; ++row) {
        bool seen[kTapSide];  // of far more rows than dy has, most are in none
        for (int64_t a = 0; a < kTapSide; ++a) {
          across.clear(0);
          for (int64_t u = rows.begin[row]; u < rows.end[row]; ++u) {
            const int64_t at = u - a + 1;
            if (at < 0 || at >= rows.out) continue;
            across.add(0, at * row_of_dy, rows.shares[rows.offset[row] + u - rows.begin[row]]);
          }
          seen[a] = across.count(0) > 0;
          if (!seen[a]) continue;
          add_up<T, S>(across, 0, from, p.c, sums.get() + a * length * t.channels, t.channels,
                       t.channels, length);
        }
        T* out = dz + ((t.image * rows.in + row) * columns.in + t.first) * kTaps * p.c + t.channel;
        for (int64_t j = 0; j < width; ++j) {
          for (const int64_t until = min(most_runs, fetched + each); fetched < until; ++fetched) {
            const T* run = from + fetched / length * row_of_dy + fetched % length * p.c;
            for (int64_t i = 0; i < t.channels; i += kLine) prefetch(run + i);
          }
          for (int64_t a = 0; a < kTapSide; ++a) {
            const S* across_tap = sums.get() + a * length * t.channels;
            for (int64_t b = 0; b < kTapSide && seen[a]; ++b, out += p.c) {
              add_up<S, T>(along, j * kTapSide + b, across_tap, 0, out, 0, t.channels, 1);
            }
            for (int64_t b = 0; b < kTapSide && !seen[a]; ++b, out += p.c) {
              std::memset(out, 0, static_cast<size_t>(t.channels) * sizeof(T));
            }
          }
        }
      }
    }
  }
};

}  // namespace

void upsample_taps_fwd_cpu(const UpsampleTapsParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    const Taps<decltype(tag)> taps(p, false);
    parallel_ranges(taps.tasks, taps.grain,
                    [&](int64_t begin, int64_t end) { taps.fwd(begin, end); });
  });
}

void upsample_taps_bwd_cpu(const UpsampleTapsParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    const Taps<decltype(tag)> taps(p, true);
    parallel_ranges(taps.tasks, taps.grain,
                    [&](int64_t begin, int64_t end) { taps.bwd(begin, end); });
  });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
