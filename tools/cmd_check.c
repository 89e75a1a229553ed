/* annd check: reads all of an index and says whether it is sound. */
#include <stdio.h>

#include "index/index_directory.h"
#include "tools/commands.h"
#include "tools/progress.h"

static int run(const struct arguments *arguments, struct error *err)
{
    struct index_check found;
    struct job *job = progress_job(arguments, err);
    int rc = -1;

    if (!job)
        return -1;
    if (index_directory_check(vfs_posix(), arguments->positional[0], job, &found, err) < 0)
        goto done;
    printf("%s: sound. %llu blocks verified, %llu nodes, %llu edges, all reachable\n",
           arguments->positional[0], (unsigned long long)found.blocks,
           (unsigned long long)found.nodes, (unsigned long long)found.edges);
    rc = 0;
done:
    progress_end(job);
    return rc;
}

static const struct option options[] = {
    PROGRESS_OPTION,
    {0},
};

const struct command command_check = {
    .name = "check",
    .positional = "DIR",
    .summary = "verify every checksum, bound and edge of an index",
    .examples = "  annd check idx\n",
    .options = options,
    .run = run,
};
