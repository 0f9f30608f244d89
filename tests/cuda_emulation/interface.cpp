// The emulated kernels behind a C interface, for ctypes.

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation.h"
#include "routing.h"

using namespace capsule_kernels::cuda;

namespace {

std::string message;

// A workspace of NaN with a fence behind it.
class Workspace {
 public:
  explicit Workspace(std::size_t floats) : values_(floats + kFence) {
    std::memset(values_.data(), 0xff, values_.size() * sizeof(float));
  }
  float* data() { return values_.data(); }
  void check() const {
    for (std::size_t n = values_.size() - kFence; n < values_.size(); ++n) {
      if (values_[n] == values_[n]) throw std::runtime_error("a write past the workspace");
    }
  }

 private:
  static constexpr std::size_t kFence = 1024;
  std::vector<float> values_;
};

template <class Body>
const char* guarded(Body body) {
  message.clear();
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

int scalar_bytes(Scalar scalar) { return scalar == Scalar::kFloat32 ? 4 : 2; }

}  // namespace

extern "C" {

struct Call {
  Shape shape;
  Device device;
  int leaky, full_gradient;
  int scalar, products;
};

bool is_one_product(const Call& call) {
  return Scalar(call.scalar) != Scalar::kFloat32 || Products(call.products) == Products::kTf32;
}

void configure(unsigned seed, const char* skip) { emulation::configure(seed, skip); }

const char* barriers() {
  message = emulation::barriers();
  return message.c_str();
}

// The message of what went wrong, or "".
const char* forward(const Call* call, const void* u, const void* weight, const void* logits,
                    const void* bias, void* v, float* s, void* coupling) {
  return guarded([&] {
    const auto scalar = Scalar(call->scalar);
    const bool plain = is_one_product(*call) && logits == nullptr && coupling == nullptr;
    const ForwardPlan plan = plan_forward(call->shape, scalar_bytes(scalar), call->device, plain);
    emulation::begin_call("forward");
    Workspace workspace(plan.workspace_floats);
    routing_forward(
        {call->shape, call->leaky != 0, 1.0f / float(call->shape.J + (call->leaky != 0)), u, weight,
         logits, bias, v, s, coupling, workspace.data()},
        plan, scalar, Products(call->products), nullptr);
    workspace.check();
  });
}

const char* backward(const Call* call, const void* grad_v, const void* u, const void* weight,
                     const void* logits, const float* s, void* grad_u, void* grad_weight,
                     void* grad_logits, void* grad_bias) {
  return guarded([&] {
    const auto scalar = Scalar(call->scalar);
    const bool plain = is_one_product(*call) && call->full_gradient != 0 && logits == nullptr &&
                       grad_logits == nullptr;
    const BackwardPlan plan = plan_backward(call->shape, scalar_bytes(scalar), call->device, plain);
    emulation::begin_call("backward");
    Workspace workspace(plan.workspace_floats);
    const float uniform_coupling = 1.0f / float(call->shape.J + (call->leaky != 0));
    routing_backward(
        {call->shape, call->leaky != 0, call->full_gradient != 0, uniform_coupling, grad_v, u,
         weight, logits, s, grad_u, grad_weight, grad_logits, grad_bias, workspace.data()},
        plan, scalar, Products(call->products), nullptr);
    workspace.check();
  });
}

// The fields of Plan in emulator.py; 0 where nothing fits.
void planned(const Call* call, int* figures) {
  const int bytes = scalar_bytes(Scalar(call->scalar));
  const ForwardPlan forward = plan_forward(call->shape, bytes, call->device, true);
  const BackwardPlan plan = plan_backward(call->shape, bytes, call->device, true);
  figures[0] = forward.sweep.capsule_groups;
  figures[1] = forward.sweep.sample_groups;
  figures[2] = forward.sweep.tiles_per_pass;
  figures[3] = plan.gradients.capsules;
  figures[4] = plan.gradients.splits;
  figures[5] = plan.gradients.buffers;
  figures[6] = plan.outputs.blocks;
  figures[7] = plan.outputs.blocks > 0 ? plan.parts : 0;
  figures[8] = forward.sweep.slots;
}

int fits_registers(int J, int D) { return tile_fits_registers(J, D) ? 1 : 0; }
}
