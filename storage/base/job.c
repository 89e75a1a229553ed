/* Counting is one atomic addition. A thread that finds the next report due tries the report mutex:
 * whoever gets it reports, the others go on working, so reports never overlap and nobody waits for
 * one. The phase's description is read and written under that mutex. */
#include "storage/base/job.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define REPORT_NS (INT64_C(100) * 1000 * 1000)

/* Or a signal handler could not set it. */
_Static_assert(ATOMIC_BOOL_LOCK_FREE == 2, "job_cancel is async-signal-safe");

struct job {
    job_report_fn report;
    void *context;
    int64_t started_ns;
    _Atomic bool cancelled;
    _Atomic uint64_t done;
    _Atomic int64_t report_due_ns;
    pthread_mutex_t mutex;
    /* Under the mutex: */
    const char *phase; /* NULL before the first and after the last */
    uint32_t phase_number;
    uint64_t total;
    int64_t phase_started_ns;
};

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

struct job *job_new(job_report_fn report, void *context)
{
    struct job *job = calloc(1, sizeof *job);

    if (!job)
        return NULL;
    job->report = report;
    job->context = context;
    job->started_ns = now_ns();
    atomic_init(&job->cancelled, false);
    atomic_init(&job->done, 0);
    atomic_init(&job->report_due_ns, INT64_MAX);
    pthread_mutex_init(&job->mutex, NULL);
    return job;
}

void job_free(struct job *job)
{
    if (!job)
        return;
    pthread_mutex_destroy(&job->mutex);
    free(job);
}

/* With the mutex held and a phase open. */
static void report_locked(struct job *job, bool phase_end)
{
    int64_t now = now_ns();
    double phase_seconds = (double)(now - job->phase_started_ns) * 1e-9;
    struct job_progress progress = {
        .phase = job->phase,
        .phase_number = job->phase_number,
        .done = atomic_load_explicit(&job->done, memory_order_relaxed),
        .total = job->total,
        .rate = 0,
        .eta_seconds = -1,
        .elapsed_seconds = (double)(now - job->started_ns) * 1e-9,
        .phase_end = phase_end,
    };

    if (phase_seconds > 0)
        progress.rate = (double)progress.done / phase_seconds;
    if (phase_end || (progress.total > 0 && progress.done >= progress.total))
        progress.eta_seconds = 0;
    else if (progress.total > 0 && progress.rate > 0)
        progress.eta_seconds = (double)(progress.total - progress.done) / progress.rate;
    atomic_store_explicit(&job->report_due_ns, now + REPORT_NS, memory_order_relaxed);
    if (job->report)
        job->report(job->context, &progress);
}

static void end_phase_locked(struct job *job)
{
    if (job->phase)
        report_locked(job, true);
    job->phase = NULL;
}

void job_phase(struct job *job, const char *name, uint64_t total)
{
    if (!job)
        return;
    pthread_mutex_lock(&job->mutex);
    end_phase_locked(job);
    job->phase = name;
    job->phase_number++;
    job->total = total;
    job->phase_started_ns = now_ns();
    atomic_store_explicit(&job->done, 0, memory_order_relaxed);
    report_locked(job, false);
    pthread_mutex_unlock(&job->mutex);
}

int job_advance(struct job *job, uint64_t units, struct error *err)
{
    if (!job)
        return 0;
    atomic_fetch_add_explicit(&job->done, units, memory_order_relaxed);
    if (job_cancelled(job))
        return error_set(err, ERR_CANCELLED, "the job was cancelled");
    if (job->report &&
        now_ns() >= atomic_load_explicit(&job->report_due_ns, memory_order_relaxed) &&
        pthread_mutex_trylock(&job->mutex) == 0) {
        /* Again under the mutex: another thread may have reported in between. */
        if (job->phase &&
            now_ns() >= atomic_load_explicit(&job->report_due_ns, memory_order_relaxed))
            report_locked(job, false);
        pthread_mutex_unlock(&job->mutex);
    }
    return 0;
}

bool job_cancelled(const struct job *job)
{
    return job && atomic_load_explicit(&job->cancelled, memory_order_relaxed);
}

void job_finish(struct job *job)
{
    if (!job)
        return;
    pthread_mutex_lock(&job->mutex);
    end_phase_locked(job);
    pthread_mutex_unlock(&job->mutex);
}

void job_cancel(struct job *job)
{
    if (job)
        atomic_store_explicit(&job->cancelled, true, memory_order_relaxed);
}
