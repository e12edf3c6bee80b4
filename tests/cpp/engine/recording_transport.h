#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "comm/transport.h"

namespace dualpipe::testing {

// A transport that logs each call before passing it on.
class RecordingTransport final : public Transport {
 public:
  // "receive activation of ...", "wait activation of ...", "send gradient of ...", "end_step",
  // "end_step returns", "abort", "recover", "recover returns"
  using Log = std::function<void(const std::string&)>;

  RecordingTransport(std::unique_ptr<Transport> inner, Log log)
      : inner_(std::move(inner)), log_(std::move(log)) {}

  void begin_step(const StepInfo& info) override {
    log_("begin_step");
    inner_->begin_step(info);
  }
  EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override {
    log_("send " + to_string(id));
    return inner_->send(to, id, std::move(message), ready);
  }
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override {
    log_("receive " + to_string(id));
    return std::make_unique<Receipt>(inner_->receive(from, id),
                                     [this, id] { log_("wait " + to_string(id)); });
  }
  void end_step() override {
    log_("end_step");
    inner_->end_step();
    log_("end_step returns");
  }
  void abort(const Failure& failure) noexcept override {
    log_("abort");
    inner_->abort(failure);
  }
  void recover() override {
    log_("recover");
    inner_->recover();
    log_("recover returns");
  }

 private:
  class Receipt final : public PendingReceive {
   public:
    Receipt(std::unique_ptr<PendingReceive> inner, std::function<void()> log)
        : inner_(std::move(inner)), log_(std::move(log)) {}
    Arrival wait() override {
      log_();
      return inner_->wait();
    }

   private:
    std::unique_ptr<PendingReceive> inner_;
    std::function<void()> log_;
  };

  std::unique_ptr<Transport> inner_;
  Log log_;
};

}  // namespace dualpipe::testing
