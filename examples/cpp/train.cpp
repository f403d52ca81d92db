// Trains a small mixture of experts with LibTorch's modules and optimiser, without Python: a function of one variable
// that jumps between unlike pieces, which a router can learn to tell apart.

#include <scattermoe/scattermoe.h>
#include <torch/nn/init.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int64_t kPieces = 4;

// x [T, 1] in [-1, 1) -> the same shape: a wave on each quarter of the interval, of its own height, direction and pace.
torch::Tensor target(const torch::Tensor& x) {
    const torch::Tensor position = (x + 1) * (kPieces / 2.0), piece = position.floor();
    const torch::Tensor wave = torch::sin(M_PI * (piece + 1) * (position - piece));
    return torch::where(piece.remainder(2) == 0, wave, -0.5 - wave / 2);
}

// A SwiGLU mixture of experts: [T, H] -> [T, H].
class MoE : public torch::nn::Module {
  public:
    struct Output {
        torch::Tensor y;
        torch::Tensor balancing_loss;  // 1 where every expert gets as much as any other
        torch::Tensor expert_counts;   // [E]
    };

    MoE(int64_t hidden, int64_t inner, int64_t num_experts, int64_t top_k)
        : top_k_(top_k),
          router_(register_module("router", torch::nn::Linear(hidden, num_experts))),
          w_up_(register_parameter("w_up", torch::empty({num_experts, 2 * inner, hidden}))),
          w_down_(register_parameter("w_down", torch::empty({num_experts, hidden, inner}))) {
        for (const torch::Tensor& weight : {w_up_, w_down_}) {
            torch::nn::init::normal_(weight, 0, 1 / std::sqrt(static_cast<double>(weight.size(2))));
        }
    }

    Output forward(const torch::Tensor& x) {
        const int64_t num_experts = w_up_.size(0);
        const torch::Tensor logits = router_->forward(x);
        const auto [gates, expert_ids] = scattermoe::topk_gating(logits, top_k_, {.normalize = true});
        const scattermoe::Routing routing = scattermoe::route(expert_ids, num_experts);
        const torch::Tensor y = scattermoe::moe_mlp(x, w_up_, w_down_, gates, routing, {.activation = "swiglu"});
        // Switch Transformer's: the share of slots times the mean probability of each expert.
        const torch::Tensor counts = routing.expert_counts();
        const torch::Tensor share = counts / static_cast<double>(expert_ids.numel());
        return {y, num_experts * (share * logits.softmax(-1).mean(0)).sum(), counts};
    }

  private:
    int64_t top_k_;
    torch::nn::Linear router_;
    torch::Tensor w_up_, w_down_;
};

class Model : public torch::nn::Module {
  public:
    Model(int64_t hidden, int64_t num_experts, int64_t top_k)
        : in_(register_module("in", torch::nn::Linear(1, hidden))),
          moe_(register_module("moe", std::make_shared<MoE>(hidden, hidden, num_experts, top_k))),
          out_(register_module("out", torch::nn::Linear(hidden, 1))) {
        torch::nn::init::normal_(in_->weight, 0, 5);
        torch::nn::init::uniform_(in_->bias, -5, 5);
    }

    MoE::Output forward(const torch::Tensor& x) {
        MoE::Output moe = moe_->forward(torch::tanh(in_->forward(x)));
        moe.y = out_->forward(moe.y);
        return moe;
    }

  private:
    torch::nn::Linear in_;
    std::shared_ptr<MoE> moe_;
    torch::nn::Linear out_;
};

}  // namespace

int main(int argc, char** argv) {
    const int steps = argc > 1 ? std::atoi(argv[1]) : 400;
    const int report_every = std::max(1, steps / 8);
    torch::manual_seed(0);
    Model model(/*hidden=*/32, /*num_experts=*/8, /*top_k=*/2);
    torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(1e-2).weight_decay(0));
    std::printf("%5s  %8s  slots of each expert, in percent\n", "step", "loss");
    for (int step = 0; step <= steps; ++step) {
        const torch::Tensor x = torch::rand({512, 1}) * 2 - 1;
        const auto [y, balancing_loss, expert_counts] = model.forward(x);
        const torch::Tensor loss = (y - target(x)).square().mean();
        if (step % report_every == 0) {
            std::printf("%5d  %8.5f ", step, loss.item<double>());
            const torch::Tensor load = 100.0 * expert_counts / expert_counts.sum();
            for (int64_t expert = 0; expert < load.numel(); ++expert) {
                std::printf(" %3.0f", load[expert].item<double>());
            }
            std::printf("\n");
        }
        optimizer.zero_grad();
        (loss + 0.03 * balancing_loss).backward();
        optimizer.step();
    }
}
