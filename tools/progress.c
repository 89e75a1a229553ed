/* The report function runs on whichever worker advances; job.h keeps calls apart. The journal and
 * the limit are set by the owner while no worker runs. */
#include "tools/progress.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BAR_CELLS 24
#define LINE_SECONDS 10.0
#define STATUS_SECONDS 1.0
#define JSON_BYTES_MAX 1024u

enum form { FORM_BAR, FORM_LINES, FORM_JSON, FORM_OFF };

static struct job *volatile current_job;
static volatile sig_atomic_t interrupted;
static enum form form;
static double last_line, last_status;
static uint64_t memory_limit;
static struct journal *journal;

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

/* What the process holds in memory, as the kernel counts it; 0: not known. */
static uint64_t memory_now(void)
{
    unsigned long long pages = 0;
    FILE *file = fopen("/proc/self/statm", "re");

    if (file) {
        if (fscanf(file, "%*u %llu", &pages) != 1)
            pages = 0;
        fclose(file);
    }
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* "512 of 2048 MiB" */
static void print_memory(char *out, size_t bytes)
{
    uint64_t now = memory_now();

    if (memory_limit)
        snprintf(out, bytes, "%llu of %llu MiB", (unsigned long long)now >> 20,
                 (unsigned long long)memory_limit >> 20);
    else
        snprintf(out, bytes, "%llu MiB", (unsigned long long)now >> 20);
}

static void show_bar(const struct job_progress *p, const char *eta)
{
    char cells[BAR_CELLS + 1], memory[64];
    int filled = p->total ? (int)(BAR_CELLS * (double)p->done / (double)p->total) : 0;

    filled = filled > BAR_CELLS ? BAR_CELLS : filled;
    memset(cells, '-', BAR_CELLS);
    memset(cells, '#', (size_t)filled);
    cells[BAR_CELLS] = 0;
    print_memory(memory, sizeof memory);
    if (p->phase_end)
        fprintf(stderr, "\r  %-18s done, %.1f s so far, %s\033[K\n", p->phase, p->elapsed_seconds,
                memory);
    else if (p->total)
        fprintf(stderr, "\r  %-18s [%s] %5.1f %%  %.0f/s  left %s  %s\033[K", p->phase, cells,
                100.0 * (double)p->done / (double)p->total, p->rate, eta, memory);
    else
        fprintf(stderr, "\r  %-18s ...  %s\033[K", p->phase, memory);
}

static void show_line(const struct job_progress *p, const char *eta)
{
    char memory[64], number[32] = "";

    print_memory(memory, sizeof memory);
    if (p->phases && p->phase_number <= p->phases)
        snprintf(number, sizeof number, " (%u of %u)", p->phase_number, p->phases);
    if (p->total)
        fprintf(stderr, "annd: %s%s %llu of %llu, %.0f/s, left %s, %.0f s so far, memory %s\n",
                p->phase, number, (unsigned long long)p->done, (unsigned long long)p->total,
                p->rate, eta, p->elapsed_seconds, memory);
    else
        fprintf(stderr, "annd: %s%s, %.0f s so far, memory %s\n", p->phase, number,
                p->elapsed_seconds, memory);
}

/* ,"name":value, or null when it is negative, which stands for unknown */
static size_t print_known(char *out, size_t bytes, const char *name, double value)
{
    int n = value < 0 ? snprintf(out, bytes, ",\"%s\":null", name)
                      : snprintf(out, bytes, ",\"%s\":%.1f", name, value);

    return n < 0 || (size_t)n >= bytes ? 0 : (size_t)n;
}

static void print_json(char *out, size_t bytes, const struct job_progress *p)
{
    size_t n = (size_t)snprintf(
        out, bytes, "{\"phase\":\"%.64s\",\"phase_number\":%u,\"done\":%llu,\"total\":%llu",
        p->phase, p->phase_number, (unsigned long long)p->done, (unsigned long long)p->total);

    n += p->phases ? (size_t)snprintf(out + n, bytes - n, ",\"phases\":%u", p->phases)
                   : (size_t)snprintf(out + n, bytes - n, ",\"phases\":null");
    n += print_known(out + n, bytes - n, "rate", p->rate);
    n += print_known(out + n, bytes - n, "eta_seconds", p->eta_seconds);
    n += print_known(out + n, bytes - n, "eta_total_seconds", p->eta_total_seconds);
    n += print_known(out + n, bytes - n, "elapsed_seconds", p->elapsed_seconds);
    n += (size_t)snprintf(out + n, bytes - n, ",\"memory_bytes\":%llu",
                          (unsigned long long)memory_now());
    n += memory_limit ? (size_t)snprintf(out + n, bytes - n, ",\"memory_limit_bytes\":%llu",
                                         (unsigned long long)memory_limit)
                      : (size_t)snprintf(out + n, bytes - n, ",\"memory_limit_bytes\":null");
    n += print_known(out + n, bytes - n, "checkpoint_age_seconds",
                     journal ? journal_commit_age(journal) : -1);
    snprintf(out + n, bytes - n, ",\"phase_end\":%s}\n", p->phase_end ? "true" : "false");
}

static void show(void *context, const struct job_progress *p)
{
    char eta[32], json[JSON_BYTES_MAX];

    (void)context;
    print_eta(eta, sizeof eta, p->eta_seconds);
    switch (form) {
    case FORM_BAR:
        show_bar(p, eta);
        break;
    case FORM_LINES:
        /* Nothing for jobs of a few seconds. */
        if (p->elapsed_seconds - last_line >= LINE_SECONDS) {
            show_line(p, eta);
            last_line = p->elapsed_seconds;
        }
        break;
    case FORM_JSON:
        print_json(json, sizeof json, p);
        fputs(json, stderr);
        break;
    case FORM_OFF:
        break;
    }
    if (journal && p->elapsed_seconds - last_status >= STATUS_SECONDS) {
        print_json(json, sizeof json, p);
        journal_status(journal, json);
        last_status = p->elapsed_seconds;
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
    last_status = -STATUS_SECONDS; /* the first report is written */
    memory_limit = 0;
    journal = NULL;
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

void progress_memory_limit(uint64_t bytes)
{
    memory_limit = bytes;
}

void progress_journal(struct journal *to)
{
    journal = to;
}

void progress_end(struct job *job)
{
    journal = NULL;
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
