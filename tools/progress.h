/* progress: shows a job on stderr: a bar with rate and ETA on a terminal, a line per 10 s
 * otherwise, one JSON object a line with --progress json. */
#ifndef ANND_TOOLS_PROGRESS_H
#define ANND_TOOLS_PROGRESS_H

#include "storage/base/job.h"
#include "tools/options.h"

/* The one option to put into a command's table. */
#define PROGRESS_OPTION                                                                            \
    {                                                                                              \
        "progress", OPTION_TEXT, "FORM", "auto", "auto|bar|lines|json|off",                        \
            "how progress is shown on stderr", 0, 0                                                \
    }

/* Makes a job that reports as --progress says and is cancelled by SIGINT and SIGTERM. */
struct job *progress_job(const struct arguments *arguments, struct error *err);
/* Ends the display, gives the signals back. NULL is accepted. */
void progress_end(struct job *job);
/* True once SIGINT or SIGTERM came. */
bool progress_interrupted(void);

#endif
