// Runs a model that Python exported: serve MODEL INPUT OUTPUT. INPUT and OUTPUT hold a tensor each, as torch.save and
// torch.load know them. The name of MODEL says what made it:
//
//     .aoti.pt2  torch._inductor.aoti_compile_and_package: compiled ahead of time
//     .pt2       torch.export.save: a graph, run by PyTorch's native runtime
//     .pt        torch.jit.save
//
// No symbol of scattermoe is named here. The operators in the model are there because the program is linked with it.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>
#ifdef TORCH_RUNS_EXPORTED_PROGRAMS
#include <torch/nativert/ModelRunnerHandle.h>
#endif

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

at::Tensor load_tensor(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    return torch::jit::pickle_load(bytes).toTensor();
}

void save_tensor(const at::Tensor& tensor, const std::string& path) {
    const std::vector<char> bytes = torch::jit::pickle_save(tensor);
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

at::Tensor run(const std::string& model, const at::Tensor& x) {
    if (model.ends_with(".aoti.pt2")) {
        return torch::inductor::AOTIModelPackageLoader(model).run({x}).at(0);
    }
    if (model.ends_with(".pt2")) {
#ifdef TORCH_RUNS_EXPORTED_PROGRAMS
        return torch::nativert::ModelRunnerHandle(model, "model").run({x}, {}).toTensor();
#else
        TORCH_CHECK(false, "this PyTorch does not export torch::nativert::ModelRunnerHandle, which runs ", model);
#endif
    }
    return torch::jit::load(model).forward({x}).toTensor();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: %s MODEL INPUT OUTPUT\n", argv[0]);
        return 2;
    }
    const c10::InferenceMode no_gradients;
    save_tensor(run(argv[1], load_tensor(argv[2])), argv[3]);
}
