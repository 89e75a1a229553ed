/* Job: progress and cancellation of one long task.
 *
 * The task calls job_phase() at each stage and job_advance() every few milliseconds; the owner
 * watches through a report function and may cancel from any thread or from a signal handler.
 * Every function accepts a NULL job, which never reports and is never cancelled. */
#ifndef ANND_STORAGE_BASE_JOB_H
#define ANND_STORAGE_BASE_JOB_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"

struct job_progress {
    const char *phase;        /* static string given to job_phase() */
    uint32_t phase_number;    /* from 1 */
    uint64_t done;            /* units of this phase */
    uint64_t total;           /* 0: unknown */
    double rate;              /* units a second, over this phase */
    double eta_seconds;       /* of this phase; negative while unknown */
    double elapsed_seconds;   /* of the whole job */
    uint32_t phases;          /* how many there will be; 0: unknown */
    double eta_total_seconds; /* of the whole job; negative while unknown */
    bool phase_end;           /* last report of this phase */
};

/* Called by the thread that advances, at most every 100 ms and at each phase's start and end. Calls
 * never overlap. */
typedef void (*job_report_fn)(void *context, const struct job_progress *progress);

struct job;

/* report may be NULL. NULL only when memory is out. */
struct job *job_new(job_report_fn report, void *context);
void job_free(struct job *job);

/* The phases to come, in order, and what each is expected to take, in any one unit: only the ratios
 * count, what was measured so far says how long the rest takes. A phase that job_phase() names is
 * the next one of that name; those passed over are taken for done, and one that is not planned
 * counts to the one before. More than JOB_PHASES_MAX: nothing is planned. Names must outlive
 * the job. Before the first phase; owner's thread only. */
#define JOB_PHASES_MAX 64u
struct job_plan_phase {
    const char *name;
    double weight;
};
void job_plan(struct job *job, const struct job_plan_phase *phases, uint32_t count);
/* Ends the phase before, starts the next. `name` must outlive the job. Owner's thread only. */
void job_phase(struct job *job, const char *name, uint64_t total);
/* Adds `units` done; any thread. Returns -1 with ERR_CANCELLED after job_cancel(). */
int job_advance(struct job *job, uint64_t units, struct error *err);
/* True after job_cancel(); any thread. */
bool job_cancelled(const struct job *job);
/* Ends the last phase, for the report. */
void job_finish(struct job *job);
/* Async-signal-safe; any thread. */
void job_cancel(struct job *job);

#endif
