// Names no symbol of the library, and finds its operators in the dispatcher by name.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/tensor.h>

#include <cstdio>

int main() {
    const auto op = c10::Dispatcher::singleton().findSchema({"scattermoe::group_by_expert", ""});
    if (!op.has_value()) {
        std::puts("not registered");
        return 1;
    }
    torch::jit::Stack stack{at::tensor({2, 0, 1, 0}), /*num_experts=*/3};
    op->callBoxed(stack);
    const bool right = stack.at(0).toTensor().equal(at::tensor({1, 3, 2, 0}, at::kInt));
    std::puts(right ? "ok" : "wrong");
    return right ? 0 : 1;
}
