// The loss row kernel of kernels/logits_rows.py (formulas there) as CUDA C++ behind a plain C ABI.
//
// cluster_kernel, sm_90 and newer: a thread-block cluster holds one row of logits in distributed shared memory, so the
// row is read from HBM once and its gradient written once. Each block bulk-copies its slice, reduces it, and meets the
// others at one cluster barrier. V = 151,936 in bf16: 4 blocks of 512 threads and 74 KB, three a multiprocessor.
// two_pass_kernel, everywhere else: one block a row, the row read twice.
// host_rows runs the same device functions thread by thread on the CPU; the tests call it where there is no GPU.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <vector>

#include "logits_rows.cuh"

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
[[maybe_unused]] constexpr int kStages = 4;  // bulk copies per slice: reducing starts when the first has landed
constexpr int kMaxCluster = 8;         // the largest portable cluster
constexpr int kSliceBytes = 76 * 1024 - 1536;  // three blocks with their reserved kilobyte fit 228 KB

__device__ Stats merge_lanes(Stats s, int lanes) {
  for (int lane = lanes / 2; lane; lane >>= 1) {
    Stats other;
    other.top = __shfl_xor_sync(~0u, s.top, lane);
    other.sum = __shfl_xor_sync(~0u, s.sum, lane);
    other.moment = __shfl_xor_sync(~0u, s.moment, lane);
    s = merge(s, other);
  }
  return s;
}

// Statistics of a block, valid in warp 0.
__device__ Stats reduce_block(Stats s, Stats* warps) {
  s = merge_lanes(s, 32);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) s = merge_lanes(warps[threadIdx.x % kWarps], kWarps);
  return s;
}

template <typename T, int VEC>
__global__ __launch_bounds__(kThreads) void two_pass_kernel(const __grid_constant__ RowArgs a) {
  __shared__ Stats warps[kWarps];
  __shared__ RowState shared_row;
  const int64_t r = blockIdx.x;
  T* row = static_cast<T*>(a.logits) + r * a.stride;
  const int count = int(a.vocab);
  if (is_dead(r, a)) {
    if (threadIdx.x == 0) store_dead(r, a);
    if (a.write_grad) zero_slice<T, VEC>(row, count, threadIdx.x, kThreads);
    return;
  }
  const int64_t target = a.target[r];
  const float wanted = threadIdx.x == 0 ? target_logit<T, false>(row, target, a) : 0.f;
  Stats s;
  accumulate<T, VEC, false>(s, row, 0, count, threadIdx.x, kThreads, a);
  s = reduce_block(s, warps);
  if (threadIdx.x == 0) shared_row = finish_row(s, wanted, r, true, a);
  __syncthreads();
  if (a.write_grad)
    write_gradient<T, VEC, false>(row, row, 0, count, threadIdx.x, kThreads, target, shared_row, a);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void start_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void wait_copy(uint64_t* barrier) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
  }
}
#endif

// Elements of a slice, a multiple of VEC; the same for every block of the cluster but the last ones.
HD int slice_length(int64_t vocab, int blocks, int vec) {
  return int((vocab / vec + blocks - 1) / blocks) * vec;
}

template <typename T, bool PLAIN>
__global__ __launch_bounds__(kThreads) void cluster_kernel(const __grid_constant__ RowArgs a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int VEC = 16 / sizeof(T);
  extern __shared__ __align__(128) unsigned char bytes[];
  __shared__ Stats warps[kWarps], block_stats;
  __shared__ RowState shared_row;
  __shared__ uint64_t barriers[kStages];
  T* slice = reinterpret_cast<T*>(bytes);

  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int64_t r = blockIdx.x / blocks;
  T* row = static_cast<T*>(a.logits) + r * a.stride;
  const int length = slice_length(a.vocab, blocks, VEC);
  const int64_t begin = int64_t(rank) * length;
  const int count = int(max(int64_t(0), min(int64_t(length), a.vocab - begin)));
  if (is_dead(r, a)) {  // the whole cluster takes this branch
    if (rank == 0 && threadIdx.x == 0) store_dead(r, a);
    if (a.write_grad) zero_slice<T, VEC>(row + begin, count, threadIdx.x, kThreads);
    return;
  }

  const int stage = slice_length(length, kStages, VEC);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barriers[i])) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the barriers, seen by the copy engine
    for (int i = 0; i < kStages; ++i) {
      const int elements = max(0, min(stage, count - i * stage));
      if (elements > 0) start_copy(slice + i * stage, row + begin + i * stage, elements * sizeof(T), &barriers[i]);
    }
  }
  const int64_t target = a.target[r];
  const float wanted = threadIdx.x == 0 ? target_logit<T, PLAIN>(row, target, a) : 0.f;
  __syncthreads();  // the barriers are initialised

  Stats s;
  for (int i = 0; i < kStages; ++i) {
    const int elements = max(0, min(stage, count - i * stage));
    if (elements > 0) {
      wait_copy(&barriers[i]);
      accumulate<T, VEC, PLAIN>(s, slice + i * stage, begin + i * stage, elements, threadIdx.x, kThreads, a);
    }
  }
  s = reduce_block(s, warps);
  if (threadIdx.x == 0) block_stats = s;
  cluster.sync();  // every block's statistics are there, every block has read the target's logit
  if (threadIdx.x == 0) {
    Stats total;
    for (int i = 0; i < blocks; ++i) total = merge(total, *cluster.map_shared_rank(&block_stats, i));
    shared_row = finish_row(total, wanted, r, rank == 0, a);
  }
  __syncthreads();
  cluster.barrier_arrive();  // done with the other blocks' shared memory
  if (a.write_grad)
    write_gradient<T, VEC, PLAIN>(slice, row + begin, begin, count, threadIdx.x, kThreads, target, shared_row, a);
  cluster.barrier_wait();  // no block may leave while another still reads its statistics
#endif
}

template <typename T, bool PLAIN>
cudaError_t launch(const RowArgs& a, bool allow_cluster, cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T);
  const bool aligned = a.vocab % VEC == 0 && a.stride % VEC == 0 && reinterpret_cast<uintptr_t>(a.logits) % 16 == 0;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;

  int blocks = 1;
  while (blocks < kMaxCluster && slice_length(a.vocab, blocks, VEC) * sizeof(T) > kSliceBytes) blocks *= 2;
  const size_t bytes = slice_length(a.vocab, blocks, VEC) * sizeof(T);
  if (allow_cluster && aligned && major >= 9 && bytes <= kSliceBytes) {
    error = cudaFuncSetAttribute(
        cluster_kernel<T, PLAIN>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSliceBytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
    const dim3 grid(unsigned(a.rows * blocks));
    const cudaLaunchConfig_t config = {grid, dim3(kThreads), bytes, stream, &attribute, 1};
    return cudaLaunchKernelEx(&config, cluster_kernel<T, PLAIN>, a);
  }
  const dim3 grid = dim3(unsigned(a.rows));
  if (aligned)
    two_pass_kernel<T, VEC><<<grid, kThreads, 0, stream>>>(a);
  else
    two_pass_kernel<T, 1><<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

// The cluster kernel's arithmetic in its order, `blocks` slices of `threads` threads, one after the other.
template <typename T, int VEC, bool PLAIN>
void host_rows(const RowArgs& a, int blocks, int threads) {
  for (int64_t r = 0; r < a.rows; ++r) {
    T* row = static_cast<T*>(a.logits) + r * a.stride;
    const std::vector<T> before(row, row + a.vocab);
    const int length = slice_length(a.vocab, blocks, VEC);
    auto each = [&](auto work) {
      for (int block = 0; block < blocks; ++block) {
        const int64_t begin = int64_t(block) * length, rest = a.vocab - begin;
        const int count = int(rest < 0 ? 0 : rest < length ? rest : length);
        for (int thread = 0; thread < threads; ++thread) work(begin, count, thread);
      }
    };
    if (is_dead(r, a)) {
      store_dead(r, a);
      if (a.write_grad) each([&](int64_t begin, int n, int t) { zero_slice<T, VEC>(row + begin, n, t, threads); });
      continue;
    }
    Stats total;
    each([&](int64_t begin, int n, int t) {
      Stats s;
      accumulate<T, VEC, PLAIN>(s, before.data() + begin, begin, n, t, threads, a);
      total = merge(total, s);
    });
    const float wanted = target_logit<T, PLAIN>(before.data(), a.target[r], a);
    const RowState state = finish_row(total, wanted, r, true, a);
    if (a.write_grad)
      each([&](int64_t begin, int n, int t) {
        write_gradient<T, VEC, PLAIN>(
            before.data() + begin, row + begin, begin, n, t, threads, a.target[r], state, a);
      });
  }
}

template <typename T>
int run(const RowArgs& a, int mode, cudaStream_t stream) {
  const bool plain = !a.bias && a.softcap <= 0.f;
  if (mode == 2) {
    constexpr int VEC = 16 / sizeof(T);
    if (a.vocab % VEC == 0)
      plain ? host_rows<T, VEC, true>(a, 4, 32) : host_rows<T, VEC, false>(a, 4, 32);
    else
      plain ? host_rows<T, 1, true>(a, 1, 32) : host_rows<T, 1, false>(a, 1, 32);
    return 0;
  }
  return plain ? launch<T, true>(a, mode == 0, stream) : launch<T, false>(a, mode == 0, stream);
}

// dtype: 0 fp32, 1 fp16, 2 bf16. mode: 0 best kernel, 1 two passes, 2 on the host. Returns a cudaError_t, -1 for a bad dtype.
extern "C" int pact_rows_loss(const RowArgs* args, int dtype, int mode, void* stream) {
  if (args->rows == 0) return 0;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case 0: return run<float>(*args, mode, s);
    case 1: return run<__half>(*args, mode, s);
    case 2: return run<__nv_bfloat16>(*args, mode, s);
  }
  return -1;
}

extern "C" const char* pact_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
extern "C" int pact_row_args_size() { return sizeof(RowArgs); }
