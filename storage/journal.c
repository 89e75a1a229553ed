/* How it works: build.job and build.state are manifests of one kind. The state carries the CRC of
 * the build.job it belongs to, so neither can be taken for the other, nor for that of another job.
 *
 * Every window in which a process may die leaves one of four folders: none, or one with no more
 * than the lock and a build.job.tmp in it (journal_create() takes both as free); one with build.job
 * (journal_open() goes on); one without (finished). build.state is removed, durably, before any of
 * the files it speaks of, so that a job whose removal was cut short starts from nothing instead of
 * believing in files that are gone.
 *
 * journal_finish() removes the lock file before build.job: who makes a new one in between holds a
 * lock nobody else sees, looks for build.job after that, and finds none. */
#include "storage/journal.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "storage/base/bytes.h"
#include "storage/file.h"

#define JOB_NAME "build.job"
#define STATE_NAME "build.state"
#define STATUS_NAME "build.status"
#define LOCK_NAME "build.lock"
#define SCRATCH_NAME "scratch"
#define ENTRY_JOB "journal.job" /* in the state: CRC-32C of the bytes of build.job */
#define MAGIC "ANNDJOBM"

struct journal {
    struct vfs *vfs;
    char folder[FILE_PATH_MAX];
    struct vfs_file *lock;
    struct manifest *asked;
    struct manifest *state;
    uint32_t job_crc;
    bool failed;   /* a commit did: disk and memory may differ */
    bool finished; /* nothing may be written any more */
    _Atomic int64_t committed_ns;
};

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* `folder` without slashes at its end, so that joining and taking its parent agree. Leaves room for
 * the names within. */
static int journal_new(struct vfs *vfs, const char *folder, struct journal **out, struct error *err)
{
    size_t bytes = strlen(folder);
    struct journal *j;

    while (bytes > 1 && folder[bytes - 1] == '/')
        bytes--;
    if (bytes == 0 || bytes + 64 >= FILE_PATH_MAX)
        return error_set(err, ERR_INVALID, "the path of the folder is empty or too long: %.100s",
                         folder);
    j = calloc(1, sizeof *j);
    if (!j)
        return error_set(err, ERR_NOMEM, "no memory for a journal");
    j->vfs = vfs;
    memcpy(j->folder, folder, bytes);
    atomic_init(&j->committed_ns, now_ns());
    *out = j;
    return 0;
}

static const char *path_of(const struct journal *j, const char *name, char out[FILE_PATH_MAX])
{
    file_path_join(out, j->folder, name, NULL); /* journal_new() left room */
    return out;
}

static int lock_take(struct journal *j, struct error *err)
{
    char path[FILE_PATH_MAX];
    int rc;

    path_of(j, LOCK_NAME, path);
    j->lock = file_open(j->vfs, path, VFS_WRITE | VFS_OPEN_OR_CREATE, err);
    if (!j->lock)
        return -1;
    rc = j->vfs->lock(j->lock);
    if (rc == -EWOULDBLOCK)
        error_set(err, ERR_BUSY, "another process is at work in %s", j->folder);
    else if (rc < 0)
        error_set_errno(err, rc, "%s: cannot lock", path);
    if (rc < 0) {
        file_close(j->lock, path, NULL);
        j->lock = NULL;
        return -1;
    }
    return 0;
}

static int unlink_name(struct journal *j, const char *name, struct error *err)
{
    char path[FILE_PATH_MAX];
    int rc = j->vfs->unlink(j->vfs, path_of(j, name, path));

    if (rc < 0 && rc != -ENOENT)
        return error_set_errno(err, rc, "%s: cannot remove", path);
    return 0;
}

static int remove_name(struct journal *j, const char *name, struct error *err)
{
    char path[FILE_PATH_MAX];

    return file_remove_all(j->vfs, path_of(j, name, path), err);
}

void journal_close(struct journal *journal)
{
    if (!journal)
        return;
    file_close(journal->lock, LOCK_NAME, NULL);
    manifest_free(journal->asked);
    manifest_free(journal->state);
    free(journal);
}

/* ---- create ---- */

struct leftovers {
    bool foreign; /* something that no journal_create() leaves */
};

static void look(void *context, const char *name, enum vfs_kind kind)
{
    struct leftovers *found = context;

    if (kind != VFS_FILE || (strcmp(name, LOCK_NAME) != 0 && strcmp(name, JOB_NAME ".tmp") != 0))
        found->foreign = true;
}

/* 0 when a journal may be created in `folder`, which is there; ERR_EXISTS when not. */
static int refuse_taken(struct vfs *vfs, const char *folder, struct error *err)
{
    struct leftovers found = {false};
    struct vfs_stat st;
    int rc;

    if (file_stat(vfs, folder, &st, err) < 0)
        return -1;
    if (st.kind == VFS_DIRECTORY) {
        rc = vfs->list(vfs, folder, look, &found);
        if (rc < 0)
            return error_set_errno(err, rc, "%s: cannot list the folder", folder);
    }
    if (st.kind != VFS_DIRECTORY || found.foreign)
        return error_set(err, ERR_EXISTS, "%s is there already", folder);
    return 0;
}

bool journal_may_create(struct vfs *vfs, const char *folder)
{
    struct error err = ERROR_INIT;

    return refuse_taken(vfs, folder, &err) == 0 || err.code == ERR_NOT_FOUND;
}

int journal_create(struct vfs *vfs, const char *folder, const struct manifest *asked,
                   struct journal **out, struct error *err)
{
    char path[FILE_PATH_MAX], parent[FILE_PATH_MAX];
    struct error lock_err = ERROR_INIT;
    struct journal *j = NULL;
    uint8_t *bytes = NULL;
    bool made = false; /* the folder is this call's to remove, if nothing else is in it */
    bool ours = false; /* and so is what is in it */
    size_t count;
    int rc = -1, called;

    if (journal_new(vfs, folder, &j, err) < 0)
        return -1;
    file_path_folder(parent, j->folder);
    if (manifest_encode(asked, &bytes, &count, err) < 0 ||
        manifest_decode(MANIFEST_JOB, bytes, count, path_of(j, JOB_NAME, path), &j->asked, err) < 0)
        goto done;
    j->job_crc = crc32c(0, bytes, count);
    j->state = manifest_new(MANIFEST_JOB);
    if (!j->state) {
        error_set(err, ERR_NOMEM, "no memory for a journal");
        goto done;
    }
    called = vfs->mkdir(vfs, j->folder);
    if (called == -EEXIST) {
        if (refuse_taken(vfs, j->folder, err) < 0)
            goto done;
    } else if (called < 0) {
        error_set_errno(err, called, "%s: cannot create the folder", j->folder);
        goto done;
    }
    made = called == 0;
    if (lock_take(j, &lock_err) < 0) {
        /* Another process may have found the new folder; then it is that one's. */
        made = made && lock_err.code != ERR_BUSY;
        error_set(err, lock_err.code, "%s", lock_err.message);
        goto done;
    }
    /* Again: who held the lock before may have been quicker. */
    if (refuse_taken(vfs, j->folder, err) < 0)
        goto done;
    made = ours = true;
    if (file_publish(vfs, path_of(j, JOB_NAME, path), bytes, count, err) < 0 ||
        file_dirsync(vfs, parent, err) < 0)
        goto done;
    *out = j;
    j = NULL; /* moved to the caller */
    rc = 0;
done:
    if (j && ours) {
        unlink_name(j, JOB_NAME, NULL);
        unlink_name(j, JOB_NAME ".tmp", NULL);
    }
    if (j && made) {
        unlink_name(j, LOCK_NAME, NULL);
        vfs->rmdir(vfs, j->folder);
    }
    journal_close(j);
    free(bytes);
    return rc;
}

/* ---- open ---- */

bool journal_exists(struct vfs *vfs, const char *folder)
{
    char path[FILE_PATH_MAX];

    return file_path_join(path, folder, JOB_NAME, NULL) == 0 && file_exists(vfs, path);
}

/* ERR_NOT_FOUND when there is no build.job. */
static int job_find(struct journal *j, struct error *err)
{
    struct error stat_err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    struct vfs_stat st;

    if (file_stat(j->vfs, path_of(j, JOB_NAME, path), &st, &stat_err) == 0)
        return 0;
    if (stat_err.code == ERR_NOT_FOUND)
        return error_set(err, ERR_NOT_FOUND, "%s holds no unfinished job: it has no %s", j->folder,
                         JOB_NAME);
    return error_set(err, stat_err.code, "%s", stat_err.message);
}

/* Takes the lock of a job that is there. */
static int job_lock(struct journal *j, struct error *err)
{
    if (job_find(j, err) < 0 || lock_take(j, err) < 0)
        return -1;
    /* Again: whoever held the lock may have finished. Then the lock file just made is litter. */
    if (job_find(j, err) < 0) {
        unlink_name(j, LOCK_NAME, NULL);
        return -1;
    }
    return 0;
}

static int asked_read(struct journal *j, struct error *err)
{
    struct error read_err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1;

    path_of(j, JOB_NAME, path);
    if (file_read_whole(j->vfs, path, MANIFEST_BYTES_MAX, &bytes, &count, &read_err) < 0) {
        error_set(err, read_err.code == ERR_INVALID ? ERR_CORRUPT : read_err.code, "%s",
                  read_err.message);
        goto done;
    }
    if (manifest_decode(MANIFEST_JOB, bytes, count, path, &j->asked, err) < 0)
        goto done;
    if (manifest_has(j->asked, ENTRY_JOB)) {
        error_set(err, ERR_CORRUPT, "%s is the state of a job, not its record", path);
        goto done;
    }
    j->job_crc = crc32c(0, bytes, count);
    rc = 0;
done:
    free(bytes);
    return rc;
}

static int state_read(struct journal *j, struct error *err)
{
    struct error read_err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    uint64_t crc;

    path_of(j, STATE_NAME, path);
    if (manifest_read(j->vfs, MANIFEST_JOB, path, &j->state, &read_err) < 0) {
        if (read_err.code != ERR_NOT_FOUND)
            return error_set(err, read_err.code, "%s", read_err.message);
        j->state = manifest_new(MANIFEST_JOB);
        return j->state ? 0 : error_set(err, ERR_NOMEM, "no memory for a journal");
    }
    if (manifest_get_u64(j->state, ENTRY_JOB, &crc, err) < 0)
        return -1;
    if (crc != j->job_crc)
        return error_set(err, ERR_CORRUPT,
                         "%s belongs to a job of CRC-32C %08llx, %s has CRC-32C %08x", path,
                         (unsigned long long)crc, JOB_NAME, j->job_crc);
    return 0;
}

int journal_open(struct vfs *vfs, const char *folder, struct journal **out, struct error *err)
{
    struct journal *j = NULL;
    int rc = -1;

    if (journal_new(vfs, folder, &j, err) < 0 || job_lock(j, err) < 0 || asked_read(j, err) < 0 ||
        state_read(j, err) < 0)
        goto done;
    *out = j;
    j = NULL; /* moved to the caller */
    rc = 0;
done:
    journal_close(j);
    return rc;
}

const struct manifest *journal_asked(const struct journal *journal)
{
    return journal->asked;
}

struct manifest *journal_state(struct journal *journal)
{
    return journal->state;
}

/* ---- work ---- */

int journal_commit(struct journal *journal, struct error *err)
{
    char path[FILE_PATH_MAX];
    uint8_t *bytes = NULL;
    size_t count;
    int rc = -1, called;

    if (journal->failed || journal->finished)
        return error_set(err, ERR_IO, "%s: no more is written, after an error or the end",
                         path_of(journal, STATE_NAME, path));
    journal->failed = true; /* until all is done */
    if (manifest_set_u64(journal->state, ENTRY_JOB, journal->job_crc, err) < 0 ||
        manifest_encode(journal->state, &bytes, &count, err) < 0)
        goto done;
    /* The names of the synced files the state speaks of; publishing syncs the folder itself. */
    path_of(journal, SCRATCH_NAME, path);
    called = journal->vfs->dirsync(journal->vfs, path);
    if (called < 0 && called != -ENOENT) {
        error_set_errno(err, called, "%s: cannot sync the folder", path);
        goto done;
    }
    if (file_publish(journal->vfs, path_of(journal, STATE_NAME, path), bytes, count, err) < 0)
        goto done;
    atomic_store_explicit(&journal->committed_ns, now_ns(), memory_order_relaxed);
    journal->failed = false;
    rc = 0;
done:
    free(bytes);
    return rc;
}

double journal_commit_age(const struct journal *journal)
{
    int64_t at = atomic_load_explicit(&journal->committed_ns, memory_order_relaxed);

    return (double)(now_ns() - at) * 1e-9;
}

bool journal_commit_due(const struct journal *journal)
{
    const char *asked = getenv("ANND_COMMIT_SECONDS");

    return journal_commit_age(journal) >= (asked ? atof(asked) : JOURNAL_COMMIT_SECONDS);
}

int journal_scratch_path(const struct journal *journal, const char *name, char *out,
                         struct error *err)
{
    char folder[FILE_PATH_MAX];
    int rc;

    path_of(journal, SCRATCH_NAME, folder);
    rc = journal->vfs->mkdir(journal->vfs, folder);
    if (rc < 0 && rc != -EEXIST)
        return error_set_errno(err, rc, "%s: cannot create the folder", folder);
    return file_path_join(out, folder, name, err);
}

void journal_status(struct journal *journal, const char *json)
{
    char path[FILE_PATH_MAX], aside[FILE_PATH_MAX];
    struct vfs_file *file;
    int rc;

    if (journal->finished)
        return;
    path_of(journal, STATUS_NAME, path);
    path_of(journal, STATUS_NAME ".tmp", aside);
    journal->vfs->unlink(journal->vfs, aside);
    file = file_open(journal->vfs, aside, VFS_WRITE | VFS_CREATE, NULL);
    if (!file)
        return;
    /* Renamed whole, so that a reader never sees half of one; not synced, for it is gone with the
     * process anyway. */
    rc = file_write_full(file, aside, json, strlen(json), 0, NULL);
    if (file_close(file, aside, NULL) < 0)
        rc = -1;
    if (rc < 0 || journal->vfs->rename(journal->vfs, aside, path) < 0)
        journal->vfs->unlink(journal->vfs, aside);
}

/* ---- end ---- */

int journal_finish(struct journal *journal, struct error *err)
{
    static const char *const names[] = {STATUS_NAME, STATUS_NAME ".tmp", STATE_NAME ".tmp",
                                        JOB_NAME ".tmp"};

    journal->finished = true;
    /* The state first: it speaks of scratch files. */
    if (unlink_name(journal, STATE_NAME, err) < 0 ||
        file_dirsync(journal->vfs, journal->folder, err) < 0)
        return -1;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (unlink_name(journal, names[i], err) < 0)
            return -1;
    if (remove_name(journal, SCRATCH_NAME, err) < 0 || unlink_name(journal, LOCK_NAME, err) < 0 ||
        file_dirsync(journal->vfs, journal->folder, err) < 0 ||
        unlink_name(journal, JOB_NAME, err) < 0)
        return -1;
    return file_dirsync(journal->vfs, journal->folder, err);
}

/* Whether build.job begins like one of ours. */
static int job_is_ours(struct journal *j, struct error *err)
{
    struct error read_err = ERROR_INIT;
    char path[FILE_PATH_MAX], found[sizeof MAGIC - 1];
    struct vfs_file *file;
    int rc = -1;

    path_of(j, JOB_NAME, path);
    file = file_open(j->vfs, path, VFS_READ, err);
    if (!file)
        return -1;
    if (file_read_exact(file, path, found, sizeof found, 0, &read_err) < 0 &&
        read_err.code != ERR_CORRUPT)
        error_set(err, read_err.code, "%s", read_err.message);
    else if (read_err.code || memcmp(found, MAGIC, sizeof found) != 0)
        error_set(err, ERR_CORRUPT, "%s does not start with \"%s\": %s may be no job of annd's",
                  path, MAGIC, j->folder);
    else
        rc = 0;
    file_close(file, path, NULL);
    return rc;
}

int journal_discard(struct vfs *vfs, const char *folder, struct error *err)
{
    char parent[FILE_PATH_MAX];
    struct journal *j = NULL;
    char **names = NULL;
    uint32_t count = 0;
    int rc = -1, called;

    if (journal_new(vfs, folder, &j, err) < 0)
        return -1;
    file_path_folder(parent, j->folder);
    /* What is somebody else's does not get as much as a lock file. */
    if (job_find(j, err) < 0 || job_is_ours(j, err) < 0 || job_lock(j, err) < 0 ||
        unlink_name(j, STATE_NAME, err) < 0 || file_dirsync(vfs, j->folder, err) < 0 ||
        file_list(vfs, j->folder, &names, &count, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++)
        if (strcmp(names[i], JOB_NAME) != 0 && strcmp(names[i], LOCK_NAME) != 0 &&
            remove_name(j, names[i], err) < 0)
            goto done;
    if (file_dirsync(vfs, j->folder, err) < 0 || unlink_name(j, JOB_NAME, err) < 0 ||
        unlink_name(j, LOCK_NAME, err) < 0)
        goto done;
    called = vfs->rmdir(vfs, j->folder);
    if (called < 0 && called != -ENOENT) {
        error_set_errno(err, called, "%s: cannot remove the folder", j->folder);
        goto done;
    }
    rc = file_dirsync(vfs, parent, err);
done:
    file_names_free(names, count);
    journal_close(j);
    return rc;
}
