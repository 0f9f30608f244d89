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
  const Grid grid{kClusterBlocks, kSweepWarps * kWarpSize, shared_bytes, /*cooperative=*/true,
                  kClusterBlocks};
  const auto kernel =
      reinterpret_cast<const void*>(routing_forward_kernel<Tf32, float, TileOf<16, 10>>);
  const int clusters = resident_clusters(kernel, grid);
  return clusters > 0 && takes_cooperative_clusters(grid) ? clusters : 0;
}

}  // namespace capsule_kernels::cuda
