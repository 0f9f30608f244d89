#include "launch.cuh"

namespace capsule_kernels::cuda {

void forward_float32(const ForwardArguments& arguments, const ForwardPlan& plan, Products products,
                     void* stream) {
  const auto run =
      products == Products::kTf32 ? forward_of<Tf32, float> : forward_of<SplitTf32, float>;
  run(arguments, plan, stream);
}

void backward_float32(const BackwardArguments& arguments, const BackwardPlan& plan,
                      Products products, void* stream) {
  const auto run =
      products == Products::kTf32 ? backward_of<Tf32, float> : backward_of<SplitTf32, float>;
  run(arguments, plan, stream);
}

// All instances of the sweeps' kernels have as many threads, so that one speaks for them.
int resident_clusters_of_sweeps(int shared_bytes) {
  return resident_clusters(
      reinterpret_cast<const void*>(routing_forward_kernel<Tf32, float, TileOf<16, 10>>),
      {kClusterBlocks, kSweepWarps * kWarpSize, shared_bytes, /*cooperative=*/true,
       kClusterBlocks});
}

}  // namespace capsule_kernels::cuda
