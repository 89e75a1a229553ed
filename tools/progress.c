/* The report function runs on whichever worker advances; job.h keeps calls apart. */
#include "tools/progress.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BAR_CELLS 24
#define LINE_SECONDS 10.0

enum form { FORM_BAR, FORM_LINES, FORM_JSON, FORM_OFF };

static struct job *volatile current_job;
static volatile sig_atomic_t interrupted;
static enum form form;
static double last_line;

static void on_signal(int number)
{
    (void)number;
    if (interrupted)
        _exit(130); /* asked twice: stop at once */
    interrupted = 1;
    if (current_job)
        job_cancel(current_job);
}

static void print_eta(char *out, size_t bytes, double seconds)
{
    if (seconds < 0)
        snprintf(out, bytes, "--");
    else if (seconds < 100)
        snprintf(out, bytes, "%.0f s", seconds);
    else if (seconds < 6000)
        snprintf(out, bytes, "%.0f min", seconds / 60);
    else
        snprintf(out, bytes, "%.1f h", seconds / 3600);
}

static void show_bar(const struct job_progress *p, const char *eta)
{
    char cells[BAR_CELLS + 1];
    int filled = p->total ? (int)(BAR_CELLS * p->done / p->total) : 0;

    filled = filled > BAR_CELLS ? BAR_CELLS : filled;
    memset(cells, '-', BAR_CELLS);
    memset(cells, '#', (size_t)filled);
    cells[BAR_CELLS] = 0;
    if (p->total)
        fprintf(stderr, "\r  %-10s [%s] %5.1f %%  %.0f/s  left %s\033[K", p->phase, cells,
                100.0 * (double)p->done / (double)p->total, p->rate, eta);
    else
        fprintf(stderr, "\r  %-10s ...\033[K", p->phase);
    if (p->phase_end)
        fprintf(stderr, "\r  %-10s done, %.1f s so far\033[K\n", p->phase, p->elapsed_seconds);
}

static void show(void *context, const struct job_progress *p)
{
    char eta[32];

    (void)context;
    print_eta(eta, sizeof eta, p->eta_seconds);
    switch (form) {
    case FORM_BAR:
        show_bar(p, eta);
        break;
    case FORM_LINES:
        /* Nothing for jobs of a few seconds. */
        if (p->elapsed_seconds - last_line >= LINE_SECONDS) {
            if (p->total)
                fprintf(stderr, "annd: %s %llu of %llu, %.0f/s, left %s, %.0f s so far\n", p->phase,
                        (unsigned long long)p->done, (unsigned long long)p->total, p->rate, eta,
                        p->elapsed_seconds);
            else
                fprintf(stderr, "annd: %s, %.0f s so far\n", p->phase, p->elapsed_seconds);
            last_line = p->elapsed_seconds;
        }
        break;
    case FORM_JSON:
        fprintf(stderr,
                "{\"phase\":\"%s\",\"phase_number\":%u,\"done\":%llu,\"total\":%llu,\"rate\":%.1f,"
                "\"eta_seconds\":%.1f,\"elapsed_seconds\":%.1f,\"phase_end\":%s}\n",
                p->phase, p->phase_number, (unsigned long long)p->done,
                (unsigned long long)p->total, p->rate, p->eta_seconds, p->elapsed_seconds,
                p->phase_end ? "true" : "false");
        break;
    case FORM_OFF:
        break;
    }
}

struct job *progress_job(const struct arguments *arguments, struct error *err)
{
    const char *text = option_text(arguments, "progress");
    struct sigaction action = {.sa_handler = on_signal};
    struct job *job;

    if (!text || !strcmp(text, "auto"))
        form = isatty(STDERR_FILENO) ? FORM_BAR : FORM_LINES;
    else
        form = !strcmp(text, "bar")     ? FORM_BAR
               : !strcmp(text, "lines") ? FORM_LINES
               : !strcmp(text, "json")  ? FORM_JSON
                                        : FORM_OFF;
    last_line = 0;
    job = job_new(show, NULL);
    if (!job) {
        error_set(err, ERR_NOMEM, "no memory for a job");
        return NULL;
    }
    current_job = job;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    return job;
}

void progress_end(struct job *job)
{
    if (!job)
        return;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    current_job = NULL;
    job_free(job);
}

bool progress_interrupted(void)
{
    return interrupted;
}
