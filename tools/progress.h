/* progress: shows a job on stderr: a bar with rate and ETA on a terminal, a line per 10 s
 * otherwise, one JSON object a line with --progress json. A JSON object, here and in the status
 * file of a journal, has: phase, phase_number, phases, done, total, rate (a second), eta_seconds
 * (of the phase), eta_total_seconds, elapsed_seconds, memory_bytes (resident now),
 * memory_limit_bytes, checkpoint_age_seconds, phase_end; null is what is not known. */
#ifndef ANND_TOOLS_PROGRESS_H
#define ANND_TOOLS_PROGRESS_H

#include "storage/base/job.h"
#include "storage/journal.h"
#include "tools/options.h"

/* The one option to put into a command's table. */
#define PROGRESS_OPTION                                                                            \
    {                                                                                              \
        "progress", OPTION_TEXT, "FORM", "auto", "auto|bar|lines|json|off",                        \
            "how progress is shown on stderr", 0, 0                                                \
    }

/* Makes a job that reports as --progress says and is cancelled by SIGINT and SIGTERM. */
struct job *progress_job(const struct arguments *arguments, struct error *err);
/* The memory that was granted, shown beside what the process holds now; 0: none was. */
void progress_memory_limit(uint64_t bytes);
/* Also writes what is shown into the journal's status file, about once a second, whatever
 * --progress says. NULL, and before the journal is finished or closed: no more. */
void progress_journal(struct journal *journal);
/* Ends the display, gives the signals back. NULL is accepted. */
void progress_end(struct job *job);
/* True once SIGINT or SIGTERM came. */
bool progress_interrupted(void);

#endif
