// What tests/test_gpu_model.py interprets and compares with NumPy: a kernel writes its results one after the other, each of all threads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <class T>
struct Out {
  T* next;
  __device__ explicit Out(T* out) : next(out + threadIdx.x) {}
  __device__ void operator()(T value) {
    *next = value;
    next += blockDim.x;
  }
};

extern "C" __global__ void integers(const int* as, const int* bs, long long* results) {
  const int a = as[threadIdx.x], b = bs[threadIdx.x];
  const unsigned ua = static_cast<unsigned>(a), ub = static_cast<unsigned>(b);
  const long long x = a, y = b;
  Out<long long> out(results);
  out(a + b), out(a - b), out(a * b), out(x * y), out(a / b), out(a % b), out(ua / ub), out(x * 1000003 / y);
  out(a << (b & 31)), out(a >> (b & 31)), out(ua >> (b & 31)), out(x << (b & 31)), out(x * x >> (b & 31));
  out(min(a, b)), out(max(a, b)), out((a & b) | ~a), out(a ^ b), out(a == b ? x : y * 5), out(abs(a));
  out(__popc(a)), out(__clz(a)), out(__byte_perm(a, b, 0x2541)), out(__funnelshift_l(ua, ub, b & 31));
  out(x < y), out(ua < ub), out(x * y < y * y), out(x - 3 * y), out(static_cast<signed char>(a)), out(ua * 7ull + ub);
}

extern "C" __global__ void floats(const float* as, const float* bs, float* results) {
  const float a = as[threadIdx.x], b = bs[threadIdx.x];
  Out<float> out(results);
  out(a + b), out(a - b), out(a * b), out(fmaf(a, b, a)), out(a / b), out(sqrtf(fabsf(a))), out(rsqrtf(fabsf(a)));
  out(expf(a)), out(logf(fabsf(a))), out(tanhf(a)), out(floorf(a)), out(rintf(a)), out(truncf(a)), out(ceilf(a));
  out(fminf(a, b)), out(fmaxf(a, b)), out(a < b), out(static_cast<float>(static_cast<int>(a))), out(__fdividef(a, b));
  out(__half2float(__float2half_rn(a))), out(__bfloat162float(__float2bfloat16_rn(a))), out(exp2f(a));
}

extern "C" __global__ void doubles(const double* as, const double* bs, double* results) {
  const double a = as[threadIdx.x], b = bs[threadIdx.x];
  Out<double> out(results);
  out(a + b), out(a - b), out(a * b), out(fma(a, b, a)), out(a / b), out(sqrt(fabs(a))), out(rsqrt(fabs(a))), out(exp(a));
  out(log(fabs(a))), out(static_cast<double>(static_cast<float>(a))), out(static_cast<double>(static_cast<long long>(a)));
  out(floor(a)), out(a < b), out(fabs(b)), out(static_cast<double>(static_cast<int>(a)));
}

extern "C" __global__ void lanes(const int* as, int* results) {
  __shared__ alignas(16) int shared[256];
  const int t = static_cast<int>(threadIdx.x), a = as[t];
  Out<int> out(results);
  out(__shfl_xor_sync(~0u, a, 5)), out(__shfl_sync(~0u, a, a & 31)), out(__shfl_up_sync(~0u, a, 3));
  out(__shfl_down_sync(~0u, a, 4)), out(static_cast<int>(__ballot_sync(~0u, a > 0))), out(__any_sync(~0u, a == 7));
  out(static_cast<int>(__reduce_min_sync(~0u, static_cast<unsigned>(a)))), out(__reduce_add_sync(~0u, a));
  shared[t] = a;
  __syncthreads();
  out(shared[blockDim.x - 1 - threadIdx.x]);
  const int4 four = reinterpret_cast<const int4*>(shared)[t % 16];
  out(four.x + 2 * four.y + 3 * four.z + 4 * four.w), out(reinterpret_cast<const unsigned char*>(shared)[t]);
  int steps = 0;
  for (unsigned n = static_cast<unsigned>(t) + 1; n != 1; n = n % 2 ? 3 * n + 1 : n / 2) ++steps;  // as long as each lane likes
  out(steps);
  int sum = 0;
  if (t % 3 == 0) {
    for (int i = 0; i < t % 7; ++i) sum += i % 2 ? a : -1;
  } else if (t % 3 == 1) {
    sum = __popc(a);
  }
  out(sum);
  int local[8];
  for (int i = 0; i < 8; ++i) local[(i * 3 + t) % 8] = i * a;
  out(local[a & 7]);
}
