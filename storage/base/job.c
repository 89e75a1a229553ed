/* Counting is one atomic addition. A thread that finds the next report due tries the report mutex:
 * whoever gets it reports, the others go on working, so reports never overlap and nobody waits for
 * one. The phase's description is read and written under that mutex. */
#include "storage/base/job.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
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
    uint32_t phases; /* planned */
    struct job_plan_phase plan[JOB_PHASES_MAX];
    bool planned;           /* the phase under way is */
    double measured_weight; /* of the phases that ran, and what they took */
    double measured_seconds;
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

/* Seconds until the last planned phase ends: what is left of this one by its own rate, the others
 * by what a unit of weight took so far. Negative while unknown. */
static double eta_total(const struct job *job, const struct job_progress *p, double phase_seconds)
{
    double weight, measured_weight, measured_seconds, later = 0, share;

    if (!job->phases || job->phase_number == 0)
        return -1;
    for (uint32_t i = job->phase_number; i < job->phases; i++)
        later += job->plan[i].weight;
    weight = job->planned ? job->plan[job->phase_number - 1].weight : 0;
    share = p->phase_end                     ? 1
            : p->total && p->done < p->total ? (double)p->done / (double)p->total
            : p->total                       ? 1
                                             : 0;
    measured_weight = job->measured_weight;
    measured_seconds = job->measured_seconds;
    /* The first moments of a phase say little about it. */
    if (share > 0.02) {
        measured_weight += weight * share;
        measured_seconds += phase_seconds;
    }
    if (!(measured_weight > 0))
        return -1;
    if (p->eta_seconds >= 0 && share > 0.02)
        return p->eta_seconds + later * measured_seconds / measured_weight;
    return ((1 - share) * weight + later) * measured_seconds / measured_weight;
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
        .phases = job->phases,
        .phase_end = phase_end,
    };

    if (phase_seconds > 0)
        progress.rate = (double)progress.done / phase_seconds;
    if (phase_end || (progress.total > 0 && progress.done >= progress.total))
        progress.eta_seconds = 0;
    else if (progress.total > 0 && progress.rate > 0)
        progress.eta_seconds = (double)(progress.total - progress.done) / progress.rate;
    progress.eta_total_seconds = eta_total(job, &progress, phase_seconds);
    atomic_store_explicit(&job->report_due_ns, now + REPORT_NS, memory_order_relaxed);
    if (job->report)
        job->report(job->context, &progress);
}

static void end_phase_locked(struct job *job)
{
    if (!job->phase)
        return;
    report_locked(job, true);
    job->phase = NULL;
    if (job->phases && job->planned) {
        job->measured_weight += job->plan[job->phase_number - 1].weight;
        job->measured_seconds += (double)(now_ns() - job->phase_started_ns) * 1e-9;
    }
}

void job_plan(struct job *job, const struct job_plan_phase *phases, uint32_t count)
{
    if (!job || count > JOB_PHASES_MAX)
        return;
    pthread_mutex_lock(&job->mutex);
    /* Phases that came before the plan are not among its own. */
    end_phase_locked(job);
    job->phase_number = 0;
    job->phases = count;
    for (uint32_t i = 0; i < count; i++)
        job->plan[i] = phases[i];
    job->measured_weight = job->measured_seconds = 0;
    pthread_mutex_unlock(&job->mutex);
}

/* The number of the phase `name`, from 1; with a plan that of the next one so named, else of the
 * one it counts to. */
static uint32_t number_of(const struct job *job, const char *name, bool *planned)
{
    *planned = false;
    if (!job->phases)
        return job->phase_number + 1;
    for (uint32_t i = job->phase_number; i < job->phases; i++)
        if (!strcmp(job->plan[i].name, name)) {
            *planned = true;
            return i + 1;
        }
    return job->phase_number ? job->phase_number : 1;
}

void job_phase(struct job *job, const char *name, uint64_t total)
{
    if (!job)
        return;
    pthread_mutex_lock(&job->mutex);
    end_phase_locked(job);
    job->phase = name;
    job->phase_number = number_of(job, name, &job->planned);
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
