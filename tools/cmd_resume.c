/* annd resume, annd discard: what becomes of a build that stopped. */
#include <stdio.h>
#include <string.h>

#include "storage/file.h"
#include "tools/build_record.h"
#include "tools/build_run.h"
#include "tools/commands.h"
#include "tools/progress.h"

static int no_build(const char *folder, struct error *err)
{
    return error_set(err, ERR_NOT_FOUND, "%s is neither an unfinished build nor an index", folder);
}

/* For what only a new build mends. */
static int remedy_discard(const struct build_run *run, struct error *err)
{
    if (err->code == ERR_CORRUPT || err->code == ERR_INVALID || err->code == ERR_NOT_FOUND ||
        err->code == ERR_UNSUPPORTED)
        error_remedy(err, "annd discard %s, then build again", run->folder);
    return -1;
}

/* What was asked for, and all its files as they were. */
static int read_record(struct build_run *run, struct arguments *asked, struct error *err)
{
    const struct manifest *record = journal_asked(run->journal);
    char where[FILE_PATH_MAX];

    if (file_path_join(where, run->folder, "build.job", err) < 0 ||
        build_record_read(record, where, asked, err) < 0 || build_record_check(record, err) < 0)
        return remedy_discard(run, err);
    run->asked = asked;
    return 0;
}

static int open_journal(struct build_run *run, struct error *err)
{
    struct error open_err = ERROR_INIT;

    if (journal_open(vfs_posix(), run->folder, &run->journal, &open_err) == 0)
        return 0;
    if (open_err.code == ERR_BUSY)
        return error_set(err, ERR_BUSY, "%s is being built by another process", run->folder);
    *err = open_err;
    return remedy_discard(run, err);
}

static int run_resume(const struct arguments *arguments, struct error *err)
{
    struct build_run run = {0};
    struct arguments asked;
    int rc = -1, whole;

    if (build_run_folder(&run, arguments->positional[0], err) < 0)
        return -1;
    if (!journal_exists(vfs_posix(), run.folder)) {
        whole = build_run_is_whole(run.folder, err);
        if (whole > 0)
            printf("%s is a finished index: there is nothing left to do\n", run.folder);
        return whole > 0 ? 0 : whole < 0 ? -1 : no_build(run.folder, err);
    }
    if (open_journal(&run, err) < 0)
        goto done;
    /* The run before may have died after the last of its work: then the input is not even looked
     * at. */
    whole = build_run_is_whole(run.folder, err);
    if (whole < 0)
        remedy_discard(&run, err);
    if (whole > 0 && journal_finish(run.journal, err) == 0) {
        printf("%s: the index was whole already; what its build had left there is removed\n",
               run.folder);
        rc = 0;
    }
    if (whole || read_record(&run, &asked, err) < 0)
        goto done;
    if (build_run_prepare(
            &run, option_u32(option_given(arguments, "threads") ? arguments : &asked, "threads"),
            option_u64(option_given(arguments, "memory") ? arguments : &asked, "memory"), err) < 0)
        goto done;
    run.job = progress_job(arguments, err);
    if (!run.job)
        goto done;
    rc = build_run_work(&run, false, err);
done:
    build_run_release(&run);
    return rc;
}

static const struct option resume_options[] = {
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "worker threads, by default as the build began", 1,
     1024},
    {"memory", OPTION_SIZE, "SIZE", NULL, NULL, "bound of the build, by default as it began", 1,
     UINT64_MAX},
    PROGRESS_OPTION,
    {0},
};

const struct command command_resume = {
    .name = "resume",
    .positional = "DIR",
    .summary = "go on with a build that stopped",
    .examples = "  annd resume idx\n"
                "  annd resume idx --threads 2\n",
    .options = resume_options,
    .run = run_resume,
};

static int run_discard(const struct arguments *arguments, struct error *err)
{
    struct error whole_err = ERROR_INIT;
    struct build_run run = {0};
    const char *folder = run.folder;
    int whole;

    if (build_run_folder(&run, arguments->positional[0], err) < 0)
        return -1;
    whole = build_run_is_whole(folder, &whole_err);
    if (whole > 0) {
        if (!journal_exists(vfs_posix(), folder))
            return error_set(err, ERR_INVALID,
                             "%s is a finished index, not an unfinished build; it is left alone",
                             folder);
        error_set(err, ERR_INVALID, "%s is a whole index that only its build's files are left in",
                  folder);
        error_remedy(err, "annd resume %s removes those", folder);
        return -1;
    }
    if (!journal_exists(vfs_posix(), folder))
        return whole < 0 ? error_set(err, whole_err.code, "%s", whole_err.message)
                         : no_build(folder, err);
    if (journal_discard(vfs_posix(), folder, err) < 0) {
        if (err->code == ERR_BUSY) {
            error_clear(err);
            error_set(err, ERR_BUSY, "%s is being built by another process", folder);
        }
        return -1;
    }
    printf("%s: the unfinished build is removed\n", folder);
    return 0;
}

static const struct option discard_options[] = {
    {0},
};

const struct command command_discard = {
    .name = "discard",
    .positional = "DIR",
    .summary = "remove a build that stopped, with all it made",
    .examples = "  annd discard idx\n",
    .options = discard_options,
    .run = run_discard,
};
