// The sum of one array per GPU over the GPUs of a node, for messages so small that latency is all that counts. Nobody
// reads from another GPU: each rank writes into the others' inboxes and looks into its own only.
//
// A message is cut into units of 8 bytes, one per thread. What travels is a line of 16 bytes: two words, each 4 bytes of
// data and the 4 bytes of the epoch. A word is stored and loaded as one, so who sees the epoch has the data: no fence, no
// flag beside it, no barrier. (NCCL calls this way of sending LL.)
//   SHOTS 1: every rank sends all its units to all others and adds up what it gets.
//   SHOTS 2: rank r gets, adds up and sends on only the r-th part of the units: two hops, 2 / RANKS of the bytes.
// Both add in float32 in the order of ranks, so that all ranks get the same bits.
//
// A block counts its sums in its inbox: the number of the sum is the epoch, equal on all ranks since all run the same
// sums in the same order. Lines have two places, for even and odd epochs, per block, sender and thread. Why none is
// overwritten before it is read: rank a writes lines of epoch e + 2 to rank b only after its kernel of epoch e + 1 ended,
// for which its block had a line of epoch e + 1 from b (thread 0 has work in every block that there is). That line b sent
// in a kernel that began after b's kernel of epoch e had ended, and that had read all its lines of epoch e.
// What an older epoch left in a place has another number, and zero, which is nobody's epoch, is in a new inbox.
// A word that was not written for exactly 2^32 - 2 sums of its block would be taken for new; that is left at that.
//
// Macros: RANKS, UNITS, SHOTS, KIND (0 bfloat16, 1 float16, 2 float32), BLOCKS (for which an inbox has room), THREADS,
// HEAD (bytes of counters), PATIENCE (nanoseconds; a peer that is gone must not hold this GPU forever).

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int LINE = 16, PART = SHOTS == 1 ? UNITS : UNITS / RANKS;
constexpr int VALUES = KIND == 2 ? 2 : 4;  // in a unit

__device__ __forceinline__ void add(float (&sum)[VALUES], uint2 v) {
  const u32 words[2] = {v.x, v.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#if KIND == 0
    sum[2 * i] += __uint_as_float(words[i] << 16), sum[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
#elif KIND == 1
    float lo, hi;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(lo), "=f"(hi) : "r"(words[i]));
    sum[2 * i] += lo, sum[2 * i + 1] += hi;
#else
    sum[i] += __uint_as_float(words[i]);
#endif
  }
}

__device__ __forceinline__ uint2 rounded(const float (&sum)[VALUES]) {
  u32 words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#if KIND == 0
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(sum[2 * i + 1]), "f"(sum[2 * i]));
#elif KIND == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(sum[2 * i + 1]), "f"(sum[2 * i]));
#else
    words[i] = __float_as_uint(sum[i]);
#endif
  }
  return make_uint2(words[0], words[1]);
}

// where in an inbox this thread finds or leaves the line of a sender
__device__ __forceinline__ u64 place(int hop, u32 epoch, u32 sender) {
  const u64 row = ((u64)(hop * BLOCKS + blockIdx.x) * 2 + (epoch & 1)) * RANKS + sender;
  return HEAD + (row * THREADS + threadIdx.x) * LINE;
}

__device__ __forceinline__ void send(u64 to, uint2 v, u32 epoch) {
  const u64 flag = (u64)epoch << 32;
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(flag | v.x), "l"(flag | v.y) : "memory");
}

// all ranks' units of this thread in this hop; `mine` is this rank's own
__device__ __forceinline__ void receive(uint2 (&got)[RANKS], u64 inbox, int hop, u32 epoch, u32 own, uint2 mine) {
  u64 began = 0;
  for (u32 tries = 1;; ++tries) {
    bool all = true;
#pragma unroll
    for (int r = 0; r < RANKS; ++r) {
      u64 a, b;
      asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(inbox + place(hop, epoch, r)) : "memory");
      got[r] = make_uint2((u32)a, (u32)b);
      all = all && (r == own || ((u32)(a >> 32) == epoch && (u32)(b >> 32) == epoch));
    }
    if (all) break;
    if (tries % 4096 == 0) {
      u64 now;
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
      if (began == 0) began = now;
      if (now - began > PATIENCE) asm volatile("trap;");
    }
  }
#pragma unroll
  for (int r = 0; r < RANKS; ++r)
    if (r == own) got[r] = mine;
}

// peers: addresses of the inboxes of the ranks own, own + 1, ... (modulo RANKS), then own
extern "C" __global__ void __launch_bounds__(THREADS)
all_reduce(const uint2* __restrict__ x, const u64* __restrict__ peers, uint2* __restrict__ out) {
  u64 inbox[RANKS];
#pragma unroll
  for (int k = 0; k < RANKS; ++k) inbox[k] = __ldg(peers + k);
  const u32 own = (u32)__ldg(peers + RANKS);
  volatile u32* counter = (volatile u32*)inbox[0] + blockIdx.x;
  const u32 unit = blockIdx.x * THREADS + threadIdx.x, last = *counter;
  const u32 epoch = last == 0xffffffffu ? 2 : last + 1;  // odd and even in turn, never 0
  __syncthreads();
  if (threadIdx.x == 0) *counter = epoch;
  if (unit >= PART) return;
  uint2 got[RANKS];
#if SHOTS == 1
  const uint2 mine = x[unit];
#pragma unroll
  for (int k = 1; k < RANKS; ++k) send(inbox[k] + place(0, epoch, own), mine, epoch);
#else
  uint2 parts[RANKS];
#pragma unroll
  for (int k = 0; k < RANKS; ++k) parts[k] = x[(own + k) % RANKS * PART + unit];
  const uint2 mine = parts[0];
#pragma unroll
  for (int k = 1; k < RANKS; ++k) send(inbox[k] + place(0, epoch, own), parts[k], epoch);
#endif
  receive(got, inbox[0], 0, epoch, own, mine);
  float sum[VALUES] = {};
#pragma unroll
  for (int r = 0; r < RANKS; ++r) add(sum, got[r]);
  const uint2 done = rounded(sum);
#if SHOTS == 1
  out[unit] = done;
#else
#pragma unroll
  for (int k = 1; k < RANKS; ++k) send(inbox[k] + place(1, epoch, own), done, epoch);
  receive(got, inbox[0], 1, epoch, own, done);
#pragma unroll
  for (int r = 0; r < RANKS; ++r) out[r * PART + unit] = got[r];
#endif
}
