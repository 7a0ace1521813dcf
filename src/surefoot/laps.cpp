// Steps taken in a row, without Python between them; see laps.py.
//
// This is put behind what torch's compiler makes of one step, whose entry is then called `surefoot_kernels`. It
// takes the handles of its inputs, which are its own from then on, and gives two: numbers of the step, of which
// the fourth says whether it was applied, and one more tensor.

#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#include <omp.h>
#include <pthread.h>
#include <signal.h>

namespace at {
int get_num_threads();
void set_num_threads(int);
}

namespace {
namespace surefoot {

using Handle = AtenTensorHandle;
constexpr int64_t numbers_of_a_step = 4;
constexpr std::chrono::seconds most_idle(1);  // of a thread

enum Ending : int64_t { all_taken, not_applied, out_of_time, failed };

struct Lap {
    // What is asked for. moving: each step's own tensors. settings: what is written before each step.
    int64_t num_steps;
    double until;
    Handle* moving;
    const double* settings;
    // What came of it. rows: of each step its numbers, and when it ended. last: the second tensor of the last step
    // that was applied, if there is one.
    double* rows;
    int64_t num_taken;
    int64_t ending;
    double begun;
    Handle last;
    int64_t is_done;
    char error[512];
};

static_assert(sizeof(Lap) == 10 * 8 + 512, "as laps.py has it");

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);  // Python's perf_counter
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// What a thread does its arithmetic with: how it rounds, and the number of threads.
struct Conditions {
    std::fenv_t rounding;
    int num_threads;

    Conditions() : num_threads(omp_get_max_threads()) { std::fegetenv(&rounding); }

    void take_over() const {
        std::fesetenv(&rounding);
        at::get_num_threads();  // of a new thread torch sets it when it is first asked for
        if (omp_get_max_threads() != num_threads) at::set_num_threads(num_threads);  // MKL's, too
    }
};

struct Steps {
    // fixed: the tensors that all steps have. sources: of each input, which of these it is, or -1 - which of a step's
    // own. written: memory of two of the fixed ones, which is written before each step.
    std::vector<Handle> fixed, inputs;
    std::vector<int64_t> sources;
    int64_t num_moving;
    double* written[2];
    int64_t num_written[2];

    std::mutex mutex;
    std::condition_variable asked, done;
    std::deque<std::pair<Lap*, Conditions>> laps;
    bool broken_off = false, closing = false, has_thread = false;
    std::thread thread;

    void take(Lap& lap) {
        const double* settings = lap.settings;
        double* row = lap.rows;
        double ended = lap.begun = now();
        try {
            for (int64_t step = 0; step < lap.num_steps; step++) {
                if (broken_off || ended >= lap.until) {
                    lap.ending = out_of_time;
                    break;
                }
                for (int part = 0; part < 2; part++) {
                    std::memcpy(written[part], settings, num_written[part] * sizeof(double));
                    settings += num_written[part];
                }
                // Somebody else has each of these tensors, too: or Python would have to be asked when it is let go.
                for (size_t i = 0; i < inputs.size(); i++) {
                    int64_t from = sources[i];
                    Handle given = from < 0 ? lap.moving[step * num_moving - 1 - from] : fixed[from];
                    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(given, &inputs[i]));
                }
                Handle outputs[2];
                surefoot_kernels(inputs.data(), outputs);
                RAIIAtenTensorHandle numbers(outputs[0]), other(outputs[1]);
                std::memcpy(row, numbers.data_ptr(), numbers_of_a_step * sizeof(double));
                ended = row[numbers_of_a_step] = now();
                if (row[numbers_of_a_step - 1] == 0.0) {
                    lap.ending = not_applied;
                    break;
                }
                if (lap.last) aoti_torch_delete_tensor_object(lap.last);
                lap.last = other.release();
                row += numbers_of_a_step + 1;
                lap.num_taken++;
            }
        } catch (std::exception const& error) {
            lap.ending = failed;
            std::snprintf(lap.error, sizeof lap.error, "%s", error.what());
        } catch (...) {
            lap.ending = failed;
            std::snprintf(lap.error, sizeof lap.error, "unknown error");
        }
    }

    void work() {
        pthread_setname_np(pthread_self(), "surefoot-steps");
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            asked.wait_for(lock, most_idle, [this] { return closing || !laps.empty(); });
            if (laps.empty()) {
                has_thread = false;
                return;
            }
            auto [next, conditions] = laps.front();
            laps.pop_front();
            lock.unlock();
            conditions.take_over();
            take(*next);
            lock.lock();
            broken_off |= next->ending != all_taken;
            next->is_done = true;
            done.notify_all();
        }
    }

    // Begins the thread, if there is none, with `mutex` held. Signals are Python's, but for those of a crash, of which
    // its fault handler tells in the thread that crashes.
    void begin_thread() {
        if (has_thread) return;
        if (thread.joinable()) thread.join();  // it has let go of `mutex` for good
        sigset_t every, before;
        sigfillset(&every);
        for (int crash : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS}) sigdelset(&every, crash);
        pthread_sigmask(SIG_SETMASK, &every, &before);
        try {
            thread = std::thread([this] { work(); });
            has_thread = true;
        } catch (std::exception const&) {  // the process can have no more of them
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
};

}  // namespace surefoot
}  // namespace

extern "C" {

// The tensors of capsules in a Python list; with its lock.
void surefoot_handles(PyObject* capsules, surefoot::Handle* handles) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(capsules); i++) {
        handles[i] = static_cast<surefoot::Handle>(PyCapsule_GetPointer(PyList_GET_ITEM(capsules, i), nullptr));
    }
}

// Lets go of tensors; with Python's lock.
void surefoot_drop(surefoot::Handle* handles, int64_t num) {
    for (int64_t i = 0; i < num; i++) aoti_torch_delete_tensor_object(handles[i]);
}

surefoot::Steps* surefoot_open(
    surefoot::Handle* fixed, int64_t num_fixed, const int64_t* sources, int64_t num_inputs, int64_t num_moving,
    double* const* written, const int64_t* num_written
) {
    auto* steps = new surefoot::Steps;
    steps->fixed.assign(fixed, fixed + num_fixed);
    steps->sources.assign(sources, sources + num_inputs);
    steps->inputs.resize(num_inputs);
    steps->num_moving = num_moving;
    for (int part = 0; part < 2; part++) {
        steps->written[part] = written[part];
        steps->num_written[part] = num_written[part];
    }
    return steps;
}

// Has a lap taken: after those that are under way, unless one of them ends early, by another thread, which goes on
// while the caller does; or here and now.
void surefoot_begin(surefoot::Steps* steps, surefoot::Lap* lap, int64_t is_first, int64_t elsewhere) {
    {
        std::lock_guard<std::mutex> lock(steps->mutex);
        if (is_first) steps->broken_off = false;
        if (elsewhere && !steps->closing) steps->begin_thread();
        if (steps->has_thread) {
            steps->laps.emplace_back(lap, surefoot::Conditions());
            steps->asked.notify_one();
            return;
        }
    }
    steps->take(*lap);
    steps->broken_off |= lap->ending != surefoot::all_taken;
    lap->is_done = true;
}

void surefoot_wait(surefoot::Steps* steps, surefoot::Lap* lap) {
    std::unique_lock<std::mutex> lock(steps->mutex);
    steps->done.wait(lock, [lap] { return lap->is_done; });
}

// Ends the thread, once it has taken what it was asked for; without Python's lock.
void surefoot_end(surefoot::Steps* steps) {
    {
        std::lock_guard<std::mutex> lock(steps->mutex);
        steps->closing = true;
        steps->asked.notify_one();
    }
    if (steps->thread.joinable()) steps->thread.join();
}

// With Python's lock.
void surefoot_free(surefoot::Steps* steps) {
    surefoot_drop(steps->fixed.data(), static_cast<int64_t>(steps->fixed.size()));
    delete steps;
}

}  // extern "C"

void inductor_entry_impl(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles) {
    py::gil_scoped_release_simple release;
    surefoot_kernels(input_handles, output_handles);
}
