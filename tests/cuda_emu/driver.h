// For the drivers of the ops' CUDA kernels: what run.py writes, as parameters and tensors.
//
// A driver's only argument is a folder that holds the file `tensors` and `cases`, one a line:
//   op name=number name=in:offset:bytes:skip name=out:offset:bytes:skip name=inout:...
// `offset` is where in `tensors` an input is and an output goes; `skip` bytes lie between a 16-byte
// address and the tensor's first element. On stdout: `run LINE` before each case, `error CODE`
// behind it. Outputs are written unless a launcher returned an error.
#pragma once

#include <fstream>
#include <sstream>
#include <string>

namespace cuda_emu {

// A tensor in a heap block that ends with its last element, so that AddressSanitizer sees whatever
// lies beyond it.
struct Tensor {
  std::string name;
  size_t offset, skip, bytes;
  bool is_output;
  std::vector<char> content;  // of an input, or of an updated tensor before the update
  std::unique_ptr<char[]> block;

  char* data() const { return block.get() + skip; }
};

class Case {
 public:
  Case(std::string file, const std::string& line) : file_(std::move(file)) {
    std::istringstream words(line);
    words >> op_;
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }

  const std::string& op() const { return op_; }
  int64_t integer(const std::string& name) const { return std::stoll(value(name)); }
  double number(const std::string& name) const { return std::stod(value(name)); }

  // Null: the case has no tensor of this name.
  void* tensor(const std::string& name) {
    if (values_.count(name) == 0) return nullptr;
    std::istringstream parts(value(name));
    Tensor t{};
    t.name = name;
    std::string kind;
    char colon;
    std::getline(parts, kind, ':');
    if (!(parts >> t.offset >> colon >> t.bytes >> colon >> t.skip))
      fail("%s: %s=%s is no tensor", op_.c_str(), name.c_str(), value(name).c_str());
    t.is_output = kind != "in";
    if (kind != "out") {
      t.content.resize(t.bytes);
      std::ifstream in(file_, std::ios::binary);
      if (!in.seekg(t.offset).read(t.content.data(), t.bytes)) fail("cannot read %s", name.c_str());
    }
    t.block = std::make_unique<char[]>(t.skip + t.bytes);
    tensors_.push_back(std::move(t));
    return tensors_.back().data();
  }

  // Runs launch() under every schedule, each time with the inputs as they were read, then writes
  // the outputs.
  template <class Launch>
  void run(Launch launch) {
    std::vector<Output> outputs;
    for (const Tensor& t : tensors_) {
      if (t.is_output) outputs.push_back({t.name.c_str(), t.data(), t.bytes});
    }
    int error = cudaSuccess;
    try {
      check_schedules(outputs, [&] {
        for (const Tensor& t : tensors_) std::copy(t.content.begin(), t.content.end(), t.data());
        error = launch();
        if (error != cudaSuccess) throw error;  // there are no outputs to compare
        check_inputs();
      });
      write_outputs();
    } catch (int) {
    }
    std::printf("error %d\n", error);
  }

 private:
  const std::string& value(const std::string& name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) fail("%s: no value for %s", op_.c_str(), name.c_str());
    return found->second;
  }

  void check_inputs() const {
    for (const Tensor& t : tensors_) {
      if (!t.is_output && !std::equal(t.content.begin(), t.content.end(), t.data())) {
        fail("the input %s was written to", t.name.c_str());
      }
    }
  }

  void write_outputs() const {
    std::fstream out(file_, std::ios::binary | std::ios::in | std::ios::out);
    for (const Tensor& t : tensors_) {
      if (t.is_output) out.seekp(t.offset).write(t.data(), t.bytes);
    }
    if (!out.flush()) fail("cannot write %s", file_.c_str());
  }

  std::string file_, op_;
  std::map<std::string, std::string> values_;
  std::vector<Tensor> tensors_;
};

// The whole of a driver's main(): run_op(case) for each case of the folder argv[1].
template <class RunOp>
int run_cases(int argc, char** argv, RunOp run_op) {
  if (argc != 2) fail("expected one argument, the folder of the cases");
  std::ifstream cases(std::string(argv[1]) + "/cases");
  if (!cases) fail("cannot read %s/cases", argv[1]);
  for (std::string line; std::getline(cases, line);) {
    std::printf("run %s\n", line.c_str());
    std::fflush(stdout);  // a defect ends the program: the last line names its case
    Case one(std::string(argv[1]) + "/tensors", line);
    run_op(one);
  }
  return 0;
}

}  // namespace cuda_emu
