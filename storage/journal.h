/* journal: what a long job has done so far, kept in the folder it fills, so that another process
 * can go on where one stopped, whatever stopped it.
 *
 * In the folder, beside what the job makes:
 *
 *   build.job     what was asked for: a manifest written once, before any work
 *   build.state   what is done: a manifest published by rename at each journal_commit()
 *   build.status  a JSON object for people and other processes; not durable, nothing reads it back
 *   build.lock    flock held by the process at work
 *   scratch/      the job's own files
 *
 * The order that makes it safe: files are synced before the commit that speaks of them, and what a
 * commit does not speak of is thrown away or written again by whoever goes on. journal_finish()
 * removes all of it, build.job last, so a folder without build.job is a finished one or none of
 * ours. journal_discard() removes build.state first, for it speaks of what goes after it. One
 * thread (the owner of the job) calls everything; journal_status() and journal_commit_age() may
 * also be called by another one between journal_open() and journal_finish(). */
#ifndef ANND_STORAGE_JOURNAL_H
#define ANND_STORAGE_JOURNAL_H

#include <stdbool.h>

#include "storage/manifest.h"

struct journal;

/* Makes `folder` (its parent is there, it is not: ERR_EXISTS), takes the lock, writes `asked`
 * durably. `asked` is copied. ERR_IO, ERR_NO_SPACE, ERR_PERMISSION: nothing is left. A folder that
 * is empty, or that a killed journal_create() left before there was a build.job, is taken. */
int journal_create(struct vfs *vfs, const char *folder, const struct manifest *asked,
                   struct journal **out, struct error *err);
/* Goes on with the job in `folder`. ERR_NOT_FOUND when there is no build.job, ERR_BUSY when another
 * process is at work there, ERR_CORRUPT. A build.state that was never written is an empty one. */
int journal_open(struct vfs *vfs, const char *folder, struct journal **out, struct error *err);
/* Lets go of the lock; the job stays resumable unless it was finished. NULL is accepted. */
void journal_close(struct journal *journal);

/* Whether journal_create() would find its place free. */
bool journal_may_create(struct vfs *vfs, const char *folder);
/* Whether `folder` holds an unfinished job. */
bool journal_exists(struct vfs *vfs, const char *folder);

const struct manifest *journal_asked(const struct journal *journal);
/* The caller's to read and to set; durable only after journal_commit(). */
struct manifest *journal_state(struct journal *journal);
/* After one that failed all others fail: what the disk holds is known only after journal_open(). */
int journal_commit(struct journal *journal, struct error *err);
/* Seconds since the last commit of this process, or since it opened the journal. */
double journal_commit_age(const struct journal *journal);
/* Time for another: after JOURNAL_COMMIT_SECONDS, or what the environment's ANND_COMMIT_SECONDS
 * says instead (tests commit all the time). */
#define JOURNAL_COMMIT_SECONDS 15
bool journal_commit_due(const struct journal *journal);

/* `folder`/scratch/`name` into out[FILE_PATH_MAX]; the scratch folder is made when it is not there.
 */
int journal_scratch_path(const struct journal *journal, const char *name, char *out,
                         struct error *err);

/* Replaces build.status. Failures are of no consequence and not told. */
void journal_status(struct journal *journal, const char *json);

/* Removes scratch, status, state and lock, then build.job, then syncs the folder. To be called when
 * what the job made is durable. */
int journal_finish(struct journal *journal, struct error *err);

/* Removes `folder` with all in it, if it holds an unfinished job and nobody works on it:
 * build.job goes last. A build.job or build.state that is damaged is no obstacle, but one that does
 * not even begin like ours is ERR_CORRUPT: the folder may be somebody else's. ERR_NOT_FOUND,
 * ERR_BUSY, ERR_IO. */
int journal_discard(struct vfs *vfs, const char *folder, struct error *err);

#endif
