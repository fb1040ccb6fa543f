// Runs an exported detector without Python, and prints what it detects, one object per line.
//
//   detect PACKAGE.pt2 NATIVE_LIBRARY INPUT.raw BATCH HEIGHT WIDTH [MIN_SCORE]
//
// INPUT.raw holds the normalized pixels as float32, [batch, 3, height, width].

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Parses the whole text as an integer of at least 1.
int64_t parse_positive(const char* name, const char* text) {
  int64_t number = 0;
  const char* end = text + std::strlen(text);
  const auto [stopped, error] = std::from_chars(text, end, number);
  if (error != std::errc() || stopped != end || number < 1) {
    throw std::runtime_error(std::string(name) + ": expected a whole number of at least 1, got " + text);
  }
  return number;
}

// Parses the whole text as a number from 0 to 1.
double parse_score(const char* name, const char* text) {
  char* stopped = nullptr;
  const double number = std::strtod(text, &stopped);
  if (stopped == text || *stopped != '\0' || !(number >= 0 && number <= 1)) {
    throw std::runtime_error(std::string(name) + ": expected a number from 0 to 1, got " + text);
  }
  return number;
}

at::Tensor read_pixels(const char* path, int64_t batch, int64_t height, int64_t width) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) {
    throw std::runtime_error(std::string("INPUT.raw: cannot be read: ") + path);
  }
  // In double, because the product of three large sizes may overflow int64_t.
  const double expected = 4.0 * 3 * static_cast<double>(batch) * height * width;
  const auto size = static_cast<int64_t>(file.tellg());
  if (static_cast<double>(size) != expected) {
    std::ostringstream message;
    message << "INPUT.raw: expected " << std::fixed << std::setprecision(0) << expected << " bytes, got " << size
            << " in " << path;
    throw std::runtime_error(message.str());
  }
  at::Tensor pixels = at::empty({batch, 3, height, width});
  file.seekg(0);
  file.read(static_cast<char*>(pixels.data_ptr()), static_cast<std::streamsize>(pixels.nbytes()));
  return pixels;
}

void detect(int argc, char** argv) {
  // Otherwise a package accepts inputs of sizes it was not compiled for, and computes wrong numbers.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);
  // Loading the library registers saccade's operators with torch.
  if (dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw std::runtime_error(std::string("NATIVE_LIBRARY: ") + dlerror());
  }
  const int64_t batch = parse_positive("BATCH", argv[4]);
  const at::Tensor pixels =
      read_pixels(argv[3], batch, parse_positive("HEIGHT", argv[5]), parse_positive("WIDTH", argv[6]));
  const double min_score = argc > 7 ? parse_score("MIN_SCORE", argv[7]) : 0.5;

  if (!std::ifstream(argv[1])) {
    throw std::runtime_error(std::string("PACKAGE.pt2: cannot be read: ") + argv[1]);
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const std::vector<at::Tensor> outputs = model.run({pixels});
  const at::Tensor scores = outputs.at(0).sigmoid(), boxes = outputs.at(1);
  std::cout.precision(8);
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t query = 0; query < scores.size(1); ++query) {
      const auto [score, label] = scores[image][query].max(0);
      if (score.item<double>() <= min_score) {
        continue;
      }
      std::cout << image << " " << label.item<int64_t>() << " " << score.item<double>();
      for (int64_t i = 0; i < 4; ++i) {  // centre x, centre y, width, height; 0 to 1
        std::cout << " " << boxes[image][query][i].item<double>();
      }
      std::cout << "\n";
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::cerr << "expected: PACKAGE.pt2 NATIVE_LIBRARY INPUT.raw BATCH HEIGHT WIDTH [MIN_SCORE]\n";
    return 2;
  }
  try {
    detect(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
  return 0;
}
