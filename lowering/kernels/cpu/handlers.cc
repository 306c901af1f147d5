// What XLA calls, and the instruction set that its calls use.
#include <atomic>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "steps.h"
#include "xla/ffi/api/ffi.h"

namespace hire {
namespace {

namespace ffi = xla::ffi;

std::vector<const Kernels*> Supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back(&kAvx2);
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&kNeon);
#elif defined(__aarch64__) && defined(__APPLE__)
  found.push_back(&kNeon);
#endif
  found.push_back(&kPortable);
  return found;
}

std::atomic<const Kernels*>& Current() {
  static std::atomic<const Kernels*> kernels{Supported().front()};
  return kernels;
}

const Kernels& InUse() { return *Current().load(std::memory_order_relaxed); }

Element ElementOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Element::kF32;
    case ffi::BF16: return Element::kBF16;
    case ffi::F16: return Element::kF16;
    case ffi::F8E4M3FN: return Element::kE4M3;
    case ffi::F8E5M2: return Element::kE5M2;
    case ffi::S8: return Element::kS8;
    case ffi::S4: return Element::kS4;
    case ffi::U8: return Element::kU8;
    case ffi::S32: return Element::kS32;
    default: return Element::kOther;
  }
}

Array Of(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return {buffer.untyped_data(), ElementOf(buffer.element_type()), {dims.begin(), dims.end()}};
}

ffi::Error Told(const std::string& wrong) {
  return wrong.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument("hire_xform: " + wrong);
}

template <ffi::DataType Type>
auto To(ffi::Result<ffi::Buffer<Type>>& buffer) {
  return Result<ffi::NativeType<Type>>{buffer->typed_data(), static_cast<int64_t>(buffer->element_count())};
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Floats = ffi::Result<F32>;
using Integers = ffi::Result<S32>;

// The threads that XLA lends, and so many arrays: what every step takes.
auto One() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>(); }
auto Two() { return One().Arg<ffi::AnyBuffer>(); }
auto Three() { return Two().Arg<ffi::AnyBuffer>(); }
auto Four() { return Three().Arg<ffi::AnyBuffer>(); }

ffi::Error ScoresImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer rows, ffi::AnyBuffer scale,
                      ffi::AnyBuffer first, Floats out, int64_t bits) {
  return Told(ScoreRows(pool, InUse(), Of(x), Of(rows), Of(scale), Of(first), bits, 1, To(out), {nullptr, 0}));
}

ffi::Error FineScoresImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer rows, ffi::AnyBuffer scale,
                          ffi::AnyBuffer first, Floats out, Floats kept, int64_t bits) {
  return Told(ScoreRows(pool, InUse(), Of(x), Of(rows), Of(scale), Of(first), bits, 2, To(out), To(kept)));
}

ffi::Error ProductsImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer rows, ffi::AnyBuffer first,
                        Floats out) {
  const auto dims = out->dimensions();
  return Told(Products(pool, InUse(), Of(x), Of(rows), Of(first), dims.size() == 2 ? dims[1] : 0, To(out)));
}

ffi::Error SelectRowsDotImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer rows, ffi::AnyBuffer scale,
                             ffi::AnyBuffer index, Floats out, int64_t group, bool magnitudes) {
  return Told(SelectRowsDot(pool, InUse(), Of(x), Of(rows), Of(scale), Of(index), group, magnitudes, To(out)));
}

ffi::Error CombineRowsImpl(ffi::ThreadPool pool, ffi::AnyBuffer h, ffi::AnyBuffer rows, ffi::AnyBuffer scale,
                           ffi::AnyBuffer index, Floats out, int64_t group) {
  return Told(CombineRows(pool, InUse(), Of(h), Of(rows), Of(scale), Of(index), group, To(out)));
}

ffi::Error LargestImpl(ffi::ThreadPool pool, ffi::AnyBuffer scores, Floats values, Integers indices, int64_t shards,
                       bool ordered) {
  const auto dims = values->dimensions();
  const int64_t picked = dims.size() ? dims[dims.size() - 1] : 0;
  return Told(LargestOf(pool, InUse(), Of(scores), picked, shards, ordered, To(values), To(indices)));
}

ffi::Error ArgMaxImpl(ffi::ThreadPool pool, ffi::AnyBuffer values, Integers out) {
  return Told(ArgMax(pool, InUse(), Of(values), To(out)));
}

ffi::Error OpenRowsImpl(ffi::ThreadPool pool, ffi::AnyBuffer values, Integers out, Integers count) {
  return Told(OpenRows(pool, InUse(), Of(values), To(out), To(count)));
}

}  // namespace
}  // namespace hire

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_scores, hire::ScoresImpl,
                              hire::Four().Ret<hire::F32>().Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_fine_scores, hire::FineScoresImpl,
                              hire::Four().Ret<hire::F32>().Ret<hire::F32>().Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_products, hire::ProductsImpl, hire::Three().Ret<hire::F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_select_rows_dot, hire::SelectRowsDotImpl,
                              hire::Four().Ret<hire::F32>().Attr<int64_t>("group").Attr<bool>("magnitudes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_combine_rows, hire::CombineRowsImpl,
                              hire::Four().Ret<hire::F32>().Attr<int64_t>("group"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_largest, hire::LargestImpl,
                              hire::One().Ret<hire::F32>().Ret<hire::S32>().Attr<int64_t>("shards").Attr<bool>("ordered"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_arg_max, hire::ArgMaxImpl, hire::One().Ret<hire::S32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_open_rows, hire::OpenRowsImpl, hire::One().Ret<hire::S32>().Ret<hire::S32>());

extern "C" {

// Which handlers there are and what they take, as library.py says it: one more wherever that changes.
int hire_interface() { return 7; }

// The number of instruction sets that this processor runs, and the name of one, the fastest first.
int hire_instruction_sets() { return static_cast<int>(hire::Supported().size()); }
const char* hire_instruction_set(int number) {
  const auto found = hire::Supported();
  return number >= 0 && number < static_cast<int>(found.size()) ? found[number]->name : nullptr;
}
// Has all later calls run the loops of that number; whether there is one.
int hire_use(int number) {
  const auto found = hire::Supported();
  if (number < 0 || number >= static_cast<int>(found.size())) return 0;
  hire::Current().store(found[number]);
  return 1;
}
}

#pragma GCC visibility pop
