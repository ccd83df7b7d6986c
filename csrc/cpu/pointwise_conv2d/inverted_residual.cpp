// inverted_residual on the CPU: a 1x1 convolution, a depthwise one and a 1x1 convolution, of which
// the first or the last may be missing, in channels_last.
//
// A thread walks down the rows of its part of an image. A step makes a few rows of y: it expands
// the rows of x that they need and that no step before it had, into a ring of rows; of the ring it
// makes their depthwise rows; and of these y. All are float, and a step has as many rows as keep
// the ring and the depthwise rows in the L2 cache (kStepElements). Memory sees x and the residual
// read and y written once; the image between, up to six times as wide, it never sees. The
// rows that two parts of an image share are expanded twice, those between windows of a stride
// beyond the kernel for nothing.
#include "cpu/depthwise_conv2d/blocks.h"
#include "cpu/pointwise_conv2d/rows.h"

namespace fastcnn::FASTCNN_CPU_LEVEL {
namespace {

constexpr int64_t kStepElements = 1 << 16;  // 256 KiB as float

template <class T>
class InvertedResidual {
  using S = Acc<T>;
  static constexpr bool kConverts = sizeof(T) != sizeof(S);

 public:
  explicit InvertedResidual(const InvertedResidualFwdParams& p)
      : p_(p),
        s_(p.depthwise.shape),
        expands_(p.expand.c > 0),
        projects_(p.project.c > 0),
        // Whether the depthwise convolution reads x itself.
        direct_(!expands_ && !kConverts && p.x_stride == s_.c),
        expand_(p.expand.weight, p.expand.bias, expands_ ? p.expand.c : s_.c, s_.c, p.expand.act),
        project_(p.project.weight, p.project.bias, s_.c, projects_ ? p.project.c : s_.c,
                 p.project.act),
        height_(step_height()),
        vectors_(s_.c, kLanes<S>),
        sweep_{1,
               s_.c,
               s_.rows,
               s_.columns,
               false,
               false,
               nullptr,
               static_cast<const S*>(p.depthwise.weight),
               static_cast<const S*>(p.depthwise.bias),
               nullptr,
               nullptr,
               p.depthwise.act},
        packed_(sweep_.packed_size(vectors_)) {
    choose_window_sums(sweep_);
    sweep_.finish = choose_finish<S>(p.depthwise.act, false);
    if (!direct_) sweep_.ring = rows_read(height_);
    sweep_.pack(vectors_, packed_.get());
  }

  void run() const {
    // Images are shared where there are few of them: no bit depends on who makes a row.
    const int64_t rows = s_.rows.size_out;
    const int64_t parts = min(ceil_div(rows, height_), ceil_div(2 * thread_count(), s_.n));
    const int64_t tasks = s_.n * parts;
    const int64_t work = s_.n * s_.c * (s_.rows.size * s_.columns.size + pixels(rows));
    parallel_ranges(tasks, task_grain(tasks, work), [&](int64_t begin, int64_t end) {
      const Memory memory(*this);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts;
        walk(task / parts, rows * part / parts, rows * (part + 1) / parts, memory);
      }
    });
  }

 private:
  // A thread's: the ring, depthwise rows, and rows of x as float.
  struct Memory {
    const Scratch<S> ring, made, x;

    explicit Memory(const InvertedResidual& of)
        : ring(of.direct_ ? 0 : of.rows_read(of.height_) * of.s_.columns.size * of.s_.c,
               Fill::kNothing),
          made(of.projects_ || kConverts ? of.pixels(of.height_) * of.s_.c : 0, Fill::kNothing),
          x(kConverts && of.expands_
                ? of.rows_read(of.height_) * of.s_.columns.size * of.expand_.c_in
                : 0,
            Fill::kNothing) {}
  };

  int64_t pixels(int64_t rows_out) const { return rows_out * s_.columns.size_out; }
  // Rows of x that so many rows of y are made of, at most.
  int64_t rows_read(int64_t rows_out) const {
    const int64_t reach = (s_.rows.kernel - 1) * s_.rows.dilation + 1;
    return min(s_.rows.size, (rows_out - 1) * s_.rows.stride + reach);
  }
  int64_t step_height() const {
    const auto elements = [&](int64_t rows) {
      return ((direct_ ? 0 : rows_read(rows) * s_.columns.size) + pixels(rows)) * s_.c;
    };
    int64_t rows = 1;
    while (rows < s_.rows.size_out && elements(rows + 1) <= kStepElements) ++rows;
    return rows;
  }

  // Rows [begin, end) of y.
  void walk(int64_t image, int64_t begin, int64_t end, const Memory& memory) const {
    int64_t filled = 0;  // rows of x up to here are in the ring, or not needed
    for (int64_t row = begin; row < end; row += height_) {
      const Band band(s_.rows, false, row, min(end, row + height_));
      Sweep<S> sweep = sweep_;
      sweep.rows = band.rows;
      if (direct_) {
        sweep.from = reinterpret_cast<const S*>(x_of(image, band.first));
      } else {
        fill(image, max(filled, band.first), band.last, memory);
        filled = max(filled, band.last);
        sweep.from = memory.ring.get();
        sweep.first_row = band.first;
      }
      T* const y = y_of(image, row);
      const int64_t count = pixels(band.end - band.begin);
      sweep.to = memory.made.get();
      if constexpr (!kConverts) {
        if (!projects_) sweep.to = y;
      }
      sweep.sweep(vectors_, packed_.get(), 0, band.end - band.begin);
      if (projects_) {
        const T* residual = static_cast<const T*>(p_.residual);
        if (residual != nullptr) residual += y - static_cast<T*>(p_.y);
        multiply_rows(project_, Rows<T>{sweep.to, s_.c, count, residual, y, project_.c_out}, 0,
                      project_.vectors());
      } else if constexpr (kConverts) {
        for_each_vector<S>(count * s_.c, [&](int64_t i, int64_t some) {
          store(y + i, load(sweep.to + i, some), some);
        });
      }
    }
  }

  // Puts rows [first, last) of x, expanded, into the ring: at most two pieces.
  void fill(int64_t image, int64_t first, int64_t last, const Memory& memory) const {
    for (int64_t row = first, count; row < last; row += count) {
      const int64_t place = row % sweep_.ring;
      count = min(last - row, sweep_.ring - place);
      const int64_t width = s_.columns.size, all = count * width;
      S* const to = memory.ring.get() + place * width * s_.c;
      const T* x = x_of(image, row);
      if (!expands_) {
        convert_rows(x, p_.x_stride, all, s_.c, to);
        continue;
      }
      Rows<S> rows{nullptr, p_.x_stride, all, nullptr, to, s_.c};
      if constexpr (kConverts) {
        convert_rows(x, p_.x_stride, all, expand_.c_in, memory.x.get());
        rows.x = memory.x.get();
        rows.x_stride = expand_.c_in;
      } else {
        rows.x = x;
      }
      multiply_rows(expand_, rows, 0, expand_.vectors());
    }
  }

  const T* x_of(int64_t image, int64_t row) const {
    return static_cast<const T*>(p_.x) +
           (image * s_.rows.size + row) * s_.columns.size * p_.x_stride;
  }
  T* y_of(int64_t image, int64_t row) const {
    return static_cast<T*>(p_.y) + pixels(image * s_.rows.size_out + row) * project_.c_out;
  }

  const InvertedResidualFwdParams& p_;
  const DepthwiseShape& s_;
  const bool expands_, projects_, direct_;
  const Weights<S> expand_, project_;
  const int64_t height_;  // rows of y of a step
  const ChannelVectors vectors_;
  Sweep<S> sweep_;
  const Scratch<S> packed_;
};

}  // namespace

void inverted_residual_fwd_cpu(const InvertedResidualFwdParams& p) {
  dispatch_dtype(p.dtype, [&](auto tag) { InvertedResidual<decltype(tag)>(p).run(); });
}

}  // namespace fastcnn::FASTCNN_CPU_LEVEL
