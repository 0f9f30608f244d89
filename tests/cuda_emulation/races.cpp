#include "races.h"

#include <algorithm>

namespace capsule_kernels::cuda::emulation {

namespace {

void take_later(std::vector<std::uint32_t>& times, const std::vector<std::uint32_t>& others) {
  times.resize(others.size());
  for (std::size_t n = 0; n < times.size(); ++n) times[n] = std::max(times[n], others[n]);
}

}  // namespace

void Knowledge::add(const Knowledge& other) {
  take_later(time, other.time);
  take_later(published, other.published);
}

Races::Races(std::size_t threads) {
  if (threads > kMostThreads) return;
  const std::vector<std::uint32_t> never(threads);
  known_.assign(threads, {never, never});
  for (std::size_t n = 0; n < threads; ++n) known_[n].time[n] = 1;
}

void Races::tell(std::size_t thread, Knowledge& told) {
  if (known_.empty()) return;
  told.add(known_[thread]);
  ++known_[thread].time[thread];
}

void Races::learn(std::size_t thread, const Knowledge& told) {
  if (!known_.empty()) known_[thread].add(told);
}

void Races::publish(std::size_t thread) {
  if (!known_.empty()) known_[thread].published[thread] = known_[thread].time[thread];
}

Races::Page& Races::page(std::uintptr_t number) {
  auto& recent = recent_[number % std::size(recent_)];
  if (recent.second == nullptr || recent.first != number) {
    std::unique_ptr<Page>& found = pages_[number];
    if (found == nullptr) found = std::make_unique<Page>();
    recent = {number, found.get()};
  }
  return *recent.second;
}

Race Races::access(std::size_t thread, const void* at, std::size_t bytes, bool writes, Proxy proxy,
                   const void* where) {
  if (known_.empty()) return {};
  const auto& [time, published] = known_[thread];
  const Access now = {std::uint32_t(thread), std::uint32_t(proxy), time[thread], where};
  const auto knows = [&time = time](const Access& x) { return x.time <= time[x.thread]; };
  const auto sees = [&, &published = published](const Access& x) {
    return proxy == Proxy(x.proxy) || proxy == Proxy::kGeneric || x.time <= published[x.thread];
  };
  const auto first = std::uintptr_t(at) / kCellBytes,
             last = (std::uintptr_t(at) + bytes - 1) / kCellBytes;
  for (auto n = first; n <= last; ++n) {
    Cell& cell = page(n * kCellBytes / kPageBytes)[n % (kPageBytes / kCellBytes)];
    if (!knows(cell.write) || !sees(cell.write)) return {true, cell.write, true};
    if (writes) {
      for (Access& read : cell.reads) {
        if (!knows(read)) return {true, read, false};
        read = {};
      }
      cell.write = now;
    } else {
      // Who knows of this read knows of those that this thread knows of, so it takes the place of
      // one. Otherwise one is forgotten, and a race with it has to show in another place.
      Access* place = &cell.reads[replaced_++ % std::size(cell.reads)];
      for (Access& read : cell.reads) {
        if (knows(read)) place = &read;
      }
      *place = now;
    }
  }
  return {};
}

}  // namespace capsule_kernels::cuda::emulation
