// Runs an exported detector without Python: what it finds is printed, one object a line.
//
//   detect PACKAGE.pt2 NATIVE_LIBRARY INPUT.raw BATCH HEIGHT WIDTH [LEAST_SCORE]
//
// INPUT.raw holds the normalized pixels as float32, [batch, 3, height, width].

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 7) {
    std::cerr << "expected: PACKAGE.pt2 NATIVE_LIBRARY INPUT.raw BATCH HEIGHT WIDTH [LEAST_SCORE]\n";
    return 2;
  }
  // The library registers saccade's operators with torch when it is loaded.
  if (dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << "NATIVE_LIBRARY: " << dlerror() << "\n";
    return 2;
  }
  const int64_t batch = std::atoll(argv[4]), height = std::atoll(argv[5]), width = std::atoll(argv[6]);
  const double least_score = argc > 7 ? std::atof(argv[7]) : 0.5;

  torch::Tensor pixels = torch::empty({batch, 3, height, width});
  std::ifstream file(argv[3], std::ios::binary);
  if (!file.read(static_cast<char*>(pixels.data_ptr()), static_cast<std::streamsize>(pixels.nbytes()))) {
    std::cerr << "INPUT.raw: expected " << pixels.nbytes() << " bytes in " << argv[3] << "\n";
    return 2;
  }

  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const std::vector<torch::Tensor> outputs = model.run({pixels});
  const torch::Tensor scores = outputs.at(0).sigmoid(), boxes = outputs.at(1);
  std::cout.precision(8);
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t query = 0; query < scores.size(1); ++query) {
      const auto [score, label] = scores[image][query].max(0);
      if (score.item<double>() <= least_score) {
        continue;
      }
      std::cout << image << " " << label.item<int64_t>() << " " << score.item<double>();
      for (int64_t i = 0; i < 4; ++i) {  // centre x, centre y, width, height; 0 to 1
        std::cout << " " << boxes[image][query][i].item<double>();
      }
      std::cout << "\n";
    }
  }
  return 0;
}
