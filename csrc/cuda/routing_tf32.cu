#include "launch.cuh"

namespace capsule_kernels::cuda {

void forward_tf32(const ForwardArguments& arguments, const ForwardPlan& plan, void* stream) {
  forward_of<Tf32, float>(arguments, plan, stream);
}

void backward_tf32(const BackwardArguments& arguments, const BackwardPlan& plan, void* stream) {
  backward_of<Tf32, float>(arguments, plan, stream);
}

// All instances of the sweeps' kernels have as many threads, so that one speaks for them.
int resident_clusters_of_sweeps(int shared_bytes) {
  return resident_clusters(
      reinterpret_cast<const void*>(routing_forward_kernel<Tf32, float, TileOf<16, 10>>),
      {kClusterBlocks, kSweepWarps * kWarpSize, shared_bytes, /*cooperative=*/true,
       kClusterBlocks});
}

}  // namespace capsule_kernels::cuda
