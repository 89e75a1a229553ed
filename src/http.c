/* One thread of ours accepts, times out and lingers; a few threads of libmicrohttpd parse and send.
 *
 * Accept: accept4 here, limits on connections counted here, then MHD_add_connection. That keeps the
 * first bytes of a connection within our reach (another protocol may want them one day), and lets
 * a refused client read why.
 *
 * Deadlines: libmicrohttpd's own timeout is per byte of silence, so a client that sends one byte a
 * second holds a connection for ever. Every connection therefore carries an absolute deadline that
 * moves only when a phase ends; a tick of 100 ms calls shutdown() on the late ones, which
 * libmicrohttpd notices as the end of the stream. Connections stand in one locked list from accept
 * to the CLOSED notification, which comes before the descriptor is closed: a descriptor found in
 * the list cannot have been reused.
 *
 * An exchange lives inside its connection: HTTP/1.1 has one request under way per connection.
 * States: IDLE -> (request line) HEAD -> (headers) BODY -> (whole) RUNNING -> REPLIED -> IDLE.
 * In RUNNING it may be deferred: the MHD connection is suspended, another thread resumes it, and
 * libmicrohttpd calls the handler again on the thread that owns the connection.
 *
 * Refusals that leave body bytes unread would end in a TCP reset that can destroy our answer on its
 * way; such connections linger: a duplicate of the descriptor is kept, what still comes is dropped
 * for a few seconds. */
#include "src/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/tcp.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "src/log.h"

#define SECOND_US UINT64_C(1000000)
#define NEVER UINT64_MAX
#define TICK_MS 100
#define HEADER_SECONDS 10u
#define TRANSFER_SECONDS 30u
#define TRANSFER_BYTES_PER_SECOND 1000000u
#define IDLE_SECONDS 75u
#define LINGER_SECONDS 5u
#define LINGER_MAX 64u
#define CONNECTION_MEMORY_BYTES ((size_t)32 * 1024)
#define PATH_BYTES_MAX 4096u
#define BODY_STEP_BYTES ((size_t)64 * 1024)
#define BODY_KEEP_BYTES ((size_t)256 * 1024)
#define DRAIN_BYTES_MAX ((size_t)1 << 20) /* a refused body up to this size is read and dropped */
#define LISTEN_BACKLOG 511
#define ARENA_BYTES_MAX ((size_t)1 << 30)
#define LISTENER_MAX 2u

enum exchange_state {
    EXCHANGE_IDLE,
    EXCHANGE_HEAD,
    EXCHANGE_BODY,
    EXCHANGE_RUNNING,
    EXCHANGE_REPLIED
};

struct http_connection;

struct http_exchange {
    struct http_connection *connection;
    struct MHD_Connection *mhd;
    _Atomic int state; /* enum exchange_state; read by the tick */
    enum http_method method;
    char path[HTTP_PATH_BYTES_MAX];
    const struct http_route *route;
    const char *origin; /* to be named in CORS headers, from the configured list */
    char *body;
    size_t body_bytes;
    size_t body_capacity; /* counted in the server's body_memory */
    uint64_t body_received;
    uint64_t body_started_us;
    unsigned refusal_status; /* decided, but the body is read first */
    const char *refusal_type;
    const char *refusal_text;
    bool close_after;
    uint64_t started_us;
    uint64_t deadline_us;
    bool cancelled;
    struct arena arena;
    void *call;
    unsigned reply_status; /* 0: none yet */
    const char *reply_type;
    char *reply_text;
    size_t reply_bytes;
    bool reply_static;
    const char *header_name;
    const char *header_value;
    bool deferred; /* HTTP thread */
    http_handler continue_fn;
    _Atomic bool resumed;
};

struct http_connection {
    struct http_connection *next;
    struct http_connection *prev;
    struct http_server *server;
    int fd;
    bool on_metrics_port;
    bool started; /* libmicrohttpd has it */
    bool linger;
    bool expired;
    struct sockaddr_storage peer;
    _Atomic uint64_t deadline_us;
    _Atomic uint64_t idle_received; /* TCP bytes when it became idle */
    struct http_exchange exchange;
};

struct lingerer {
    int fd;
    uint64_t deadline_us;
};

struct http_server {
    struct http_options options;
    struct MHD_Daemon *daemon;
    pthread_t thread;
    bool thread_running;
    int wake_fd;
    int listen_fd[LISTENER_MAX];
    char address[LISTENER_MAX][64];
    bool loopback[LISTENER_MAX];
    uint16_t port[LISTENER_MAX];
    pthread_mutex_t lock; /* the list, lingerers */
    struct http_connection *connections;
    uint32_t connection_count;
    struct lingerer lingerers[LINGER_MAX];
    uint32_t lingerer_count;
    _Atomic bool draining;
    _Atomic bool stopping;
    _Atomic uint32_t busy;
    _Atomic uint32_t deferred;
    _Atomic uint64_t body_memory;
    _Atomic uint64_t connections_total;
    _Atomic uint64_t connections_refused;
    _Atomic uint64_t connections_expired;
    _Atomic uint64_t requests;
    _Atomic uint64_t requests_refused;
    _Atomic uint64_t received_bytes;
    _Atomic uint64_t sent_bytes;
};

static const char text_not_found[] = "404 page not found";
static const char text_bad_request[] = "{\"code\":1801,\"message\":\"malformed HTTP request\"}";
static const char text_framing[] =
    "{\"code\":1801,\"message\":\"malformed HTTP request: ambiguous or repeated headers\"}";
static const char text_encoding[] =
    "{\"code\":10,\"message\":\"service unimplemented: transfer encoding other than chunked\"}";
static const char text_too_large[] =
    "{\"code\":1102,\"message\":\"parameter too large: the request body is limited to 67108864 "
    "bytes\"}";
static const char text_memory[] =
    "{\"code\":3,\"message\":\"memory limit exceeded: too many request bodies at once\"}";
static const char text_origin[] =
    "{\"code\":65535,\"message\":\"requests from web pages of this origin are not allowed\"}";
static const char text_host[] =
    "{\"code\":65535,\"message\":\"this Host is not served here: use localhost or the address\"}";
static const char text_internal[] = "{\"code\":5,\"message\":\"service internal error\"}";
static const char text_crowded[] =
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
    "Content-Length: 66\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    "{\"code\":4,\"message\":\"too many concurrent requests, queue is full\"}";

uint64_t http_now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_US + (uint64_t)now.tv_nsec / 1000;
}

/* Addresses. */

static bool is_ip_literal(const char *host, size_t bytes)
{
    char text[INET6_ADDRSTRLEN + 1];
    struct in6_addr address;

    if (bytes >= 2 && host[0] == '[' && host[bytes - 1] == ']') {
        host++;
        bytes -= 2;
        if (bytes >= sizeof text)
            return false;
        memcpy(text, host, bytes);
        text[bytes] = '\0';
        return inet_pton(AF_INET6, text, &address) == 1;
    }
    if (bytes >= sizeof text)
        return false;
    memcpy(text, host, bytes);
    text[bytes] = '\0';
    return inet_pton(AF_INET, text, &address) == 1;
}

int http_parse_address(const char *text, char *host, size_t host_bytes, uint16_t *port,
                       bool *loopback, struct error *err)
{
    const char *colon = strrchr(text, ':');
    const char *from = text;
    size_t length;
    unsigned long number;
    char *end;
    struct in_addr v4;
    struct in6_addr v6;

    if (!colon)
        goto malformed;
    length = (size_t)(colon - text);
    if (length >= 2 && text[0] == '[' && text[length - 1] == ']') {
        from++;
        length -= 2;
    } else if (memchr(text, ':', length)) {
        goto malformed;
    }
    if (colon[1] < '0' || colon[1] > '9')
        goto malformed;
    number = strtoul(colon + 1, &end, 10);
    if (*end != '\0' || number > 65535)
        goto malformed;
    if (length == 0 || length >= host_bytes)
        goto malformed;
    memcpy(host, from, length);
    host[length] = '\0';
    if (strcmp(host, "localhost") == 0 && from == text && host_bytes > 9)
        memcpy(host, "127.0.0.1", 10);
    if (from == text && inet_pton(AF_INET, host, &v4) == 1)
        *loopback = (ntohl(v4.s_addr) >> 24) == 127;
    else if (from != text && inet_pton(AF_INET6, host, &v6) == 1)
        *loopback = IN6_IS_ADDR_LOOPBACK(&v6);
    else
        goto malformed;
    *port = (uint16_t)number;
    return 0;
malformed:
    return error_set(err, ERR_INVALID,
                     "listen address \"%s\" is not ADDR:PORT: wanted an IPv4 address, an IPv6 "
                     "address in brackets or localhost, a colon, and a port 0-65535",
                     text);
}

static int listener_open(struct http_server *server, uint32_t i, const char *text,
                         struct error *err)
{
    char host[64];
    uint16_t port;
    int one = 1;
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } address;
    socklen_t bytes;
    int fd = -1;

    if (http_parse_address(text, host, sizeof host, &port, &server->loopback[i], err) < 0)
        return -1;
    memset(&address, 0, sizeof address);
    if (inet_pton(AF_INET, host, &address.v4.sin_addr) == 1) {
        address.v4.sin_family = AF_INET;
        address.v4.sin_port = htons(port);
        bytes = sizeof address.v4;
    } else {
        inet_pton(AF_INET6, host, &address.v6.sin6_addr);
        address.v6.sin6_family = AF_INET6;
        address.v6.sin6_port = htons(port);
        bytes = sizeof address.v6;
    }
    fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        error_set_errno(err, errno, "socket for %s", text);
        goto fail;
    }
    /* A restart must not wait for connections of the last run to leave TIME_WAIT. */
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, &address.any, bytes) < 0) {
        int cause = errno;

        if (cause == EADDRINUSE) {
            error_set(err, ERR_BUSY, "cannot listen on %s: another program has this port", text);
            error_remedy(err,
                         "stop it (ss -ltnp 'sport = :%u' names it), or choose another "
                         "address with --listen ADDR:PORT",
                         port);
        } else if (cause == EADDRNOTAVAIL) {
            error_set(err, ERR_INVALID, "cannot listen on %s: this machine has no such address",
                      text);
            error_remedy(err, "ip addr lists the addresses; 127.0.0.1 serves this machine only");
        } else {
            error_set_errno(err, cause, "cannot listen on %s", text);
        }
        goto fail;
    }
    if (listen(fd, LISTEN_BACKLOG) < 0 || getsockname(fd, &address.any, &bytes) < 0) {
        error_set_errno(err, errno, "cannot listen on %s", text);
        goto fail;
    }
    server->port[i] =
        ntohs(address.any.sa_family == AF_INET ? address.v4.sin_port : address.v6.sin6_port);
    snprintf(server->address[i], sizeof server->address[i],
             address.any.sa_family == AF_INET ? "%s:%u" : "[%s]:%u", host, server->port[i]);
    server->listen_fd[i] = fd;
    return 0;
fail:
    if (fd >= 0)
        close(fd);
    return -1;
}

/* The list of connections. */

static bool same_peer(const struct sockaddr_storage *a, const struct sockaddr_storage *b)
{
    if (a->ss_family != b->ss_family)
        return false;
    if (a->ss_family == AF_INET)
        return ((const struct sockaddr_in *)a)->sin_addr.s_addr ==
               ((const struct sockaddr_in *)b)->sin_addr.s_addr;
    return memcmp(&((const struct sockaddr_in6 *)a)->sin6_addr,
                  &((const struct sockaddr_in6 *)b)->sin6_addr, sizeof(struct in6_addr)) == 0;
}

static void list_remove(struct http_server *server, struct http_connection *connection)
{
    if (connection->prev)
        connection->prev->next = connection->next;
    else
        server->connections = connection->next;
    if (connection->next)
        connection->next->prev = connection->prev;
    server->connection_count--;
}

/* Takes the descriptor; lock held. */
static void linger_add(struct http_server *server, int fd)
{
    if (server->lingerer_count == LINGER_MAX) {
        close(server->lingerers[0].fd);
        memmove(server->lingerers, server->lingerers + 1,
                (LINGER_MAX - 1) * sizeof server->lingerers[0]);
        server->lingerer_count--;
    }
    shutdown(fd, SHUT_WR);
    server->lingerers[server->lingerer_count++] =
        (struct lingerer){.fd = fd, .deadline_us = http_now_us() + LINGER_SECONDS * SECOND_US};
}

static void wake(struct http_server *server)
{
    uint64_t one = 1;

    if (write(server->wake_fd, &one, sizeof one) < 0)
        return; /* the counter is full: it is awake */
}

static uint64_t tcp_received(int fd)
{
    struct tcp_info info;
    socklen_t bytes = sizeof info;

    memset(&info, 0, sizeof info);
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) < 0)
        return 0;
    return info.tcpi_bytes_received;
}

/* Accept thread. */

static void admit(struct http_server *server, int fd, const struct sockaddr_storage *peer,
                  socklen_t peer_bytes, bool on_metrics_port)
{
    static struct log_gate gate;
    struct http_connection *connection = NULL;
    struct http_connection *other;
    struct http_connection *next;
    uint32_t from_peer = 0;
    int one = 1;
    bool crowded;

    connection = calloc(1, sizeof *connection);
    pthread_mutex_lock(&server->lock);
    for (other = server->connections; other; other = next) {
        next = other->next;
        /* A descriptor given out again: libmicrohttpd dropped that connection unannounced. */
        if (other->fd == fd) {
            list_remove(server, other);
            free(other);
            continue;
        }
        from_peer += same_peer(&other->peer, peer);
    }
    crowded = server->connection_count >= server->options.connection_max ||
              (server->options.connection_per_ip_max > 0 &&
               from_peer >= server->options.connection_per_ip_max);
    if (!connection || crowded) {
        atomic_fetch_add(&server->connections_refused, 1);
        if (send(fd, text_crowded, sizeof text_crowded - 1, MSG_NOSIGNAL | MSG_DONTWAIT) > 0)
            linger_add(server, fd);
        else
            close(fd);
        pthread_mutex_unlock(&server->lock);
        free(connection);
        log_gated(&gate, 6, LOG_LEVEL_WARNING,
                  "connection refused: %u are open, %u of them from the same address",
                  server->connection_count, from_peer);
        return;
    }
    connection->server = server;
    connection->fd = fd;
    connection->on_metrics_port = on_metrics_port;
    connection->peer = *peer;
    atomic_store(&connection->deadline_us, http_now_us() + HEADER_SECONDS * SECOND_US);
    atomic_store(&connection->idle_received, NEVER);
    connection->exchange.connection = connection;
    connection->next = server->connections;
    if (server->connections)
        server->connections->prev = connection;
    server->connections = connection;
    server->connection_count++;
    pthread_mutex_unlock(&server->lock);
    atomic_fetch_add(&server->connections_total, 1);

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (MHD_add_connection(server->daemon, fd, (const struct sockaddr *)peer, peer_bytes) ==
        MHD_YES)
        return;
    /* It has closed the descriptor. If it told us of the connection it also told us of its end. */
    pthread_mutex_lock(&server->lock);
    for (other = server->connections; other; other = other->next) {
        if (other == connection && !other->started) {
            list_remove(server, other);
            free(other);
            break;
        }
    }
    pthread_mutex_unlock(&server->lock);
    atomic_fetch_add(&server->connections_refused, 1);
}

static void accept_all(struct http_server *server, uint32_t listener)
{
    static struct log_gate gate;

    for (;;) {
        struct sockaddr_storage peer;
        socklen_t bytes = sizeof peer;
        int fd = accept4(server->listen_fd[listener], (struct sockaddr *)&peer, &bytes,
                         SOCK_NONBLOCK | SOCK_CLOEXEC);

        if (fd >= 0) {
            admit(server, fd, &peer, bytes, listener > 0);
            continue;
        }
        if (errno == EINTR || errno == ECONNABORTED)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) {
            /* Out of descriptors or memory: the connection stays in the backlog. Wait, or poll
             * would spin. */
            log_gated(&gate, 6, LOG_LEVEL_ERROR, "accept on %s: %s", server->address[listener],
                      strerror(errno));
            usleep(TICK_MS * 1000);
        }
        return;
    }
}

static void expire(struct http_connection *connection)
{
    if (connection->expired)
        return;
    connection->expired = true;
    shutdown(connection->fd, SHUT_RDWR);
}

/* The client has closed its side and everything it sent was taken. libmicrohttpd can miss that: it
 * takes a short read for an empty socket, and the edge that told of data and end at once is gone.
 */
static bool at_end(int fd)
{
    char byte;

    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

static void tick_connection(struct http_connection *connection, uint64_t now_us, bool look_at_idle)
{
    struct http_server *server = connection->server;
    uint64_t deadline_us = atomic_load(&connection->deadline_us);
    uint64_t before = atomic_load(&connection->idle_received);

    if (deadline_us <= now_us) {
        atomic_fetch_add(&server->connections_expired, 1);
        expire(connection);
        return;
    }
    switch (atomic_load(&connection->exchange.state)) {
    case EXCHANGE_IDLE:
        if (before == NEVER) /* before its first request */
            break;
        if (atomic_load(&server->draining) || (look_at_idle && at_end(connection->fd))) {
            expire(connection);
        } else if (look_at_idle && tcp_received(connection->fd) > before) {
            /* The next request has begun to arrive: its headers have their own deadline. */
            atomic_store(&connection->idle_received, NEVER);
            atomic_compare_exchange_strong(&connection->deadline_us, &deadline_us,
                                           now_us + HEADER_SECONDS * SECOND_US);
        }
        break;
    case EXCHANGE_HEAD:
    case EXCHANGE_BODY:
        if (at_end(connection->fd))
            expire(connection);
        break;
    case EXCHANGE_RUNNING:
        if (at_end(connection->fd))
            __atomic_store_n(&connection->exchange.cancelled, true, __ATOMIC_RELAXED);
        break;
    default:
        break;
    }
}

static void tick(struct http_server *server, uint64_t now_us, bool look_at_idle)
{
    struct http_connection *connection;

    pthread_mutex_lock(&server->lock);
    for (connection = server->connections; connection; connection = connection->next) {
        if (connection->started && !connection->expired)
            tick_connection(connection, now_us, look_at_idle);
    }
    pthread_mutex_unlock(&server->lock);
}

/* Lock held. Drops what came; true when the lingerer is through. */
static bool linger_step(const struct lingerer *lingerer, uint64_t now_us, char *scratch,
                        size_t scratch_bytes)
{
    if (lingerer->deadline_us <= now_us)
        return true;
    for (int i = 0; i < 64; i++) {
        ssize_t got = recv(lingerer->fd, scratch, scratch_bytes, MSG_DONTWAIT);

        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
            return true;
        if (got < 0)
            return false;
    }
    return false;
}

static void linger_all(struct http_server *server, uint64_t now_us)
{
    static char scratch[65536]; /* this thread's alone */

    pthread_mutex_lock(&server->lock);
    for (uint32_t i = 0; i < server->lingerer_count;) {
        if (linger_step(&server->lingerers[i], now_us, scratch, sizeof scratch)) {
            close(server->lingerers[i].fd);
            server->lingerers[i] = server->lingerers[--server->lingerer_count];
        } else {
            i++;
        }
    }
    pthread_mutex_unlock(&server->lock);
}

static void listeners_close(struct http_server *server)
{
    for (uint32_t i = 0; i < LISTENER_MAX; i++) {
        if (server->listen_fd[i] >= 0)
            close(server->listen_fd[i]);
        server->listen_fd[i] = -1;
    }
}

static void *accept_main(void *context)
{
    struct http_server *server = context;
    uint64_t next_tick_us = 0;
    uint32_t ticks = 0;

    pthread_setname_np(pthread_self(), "annd-accept");
    while (!atomic_load(&server->stopping)) {
        struct pollfd polled[1 + LISTENER_MAX + LINGER_MAX];
        uint32_t listener_of[LISTENER_MAX];
        nfds_t listeners = 0;
        nfds_t count = 1;
        uint64_t now_us;
        bool quiet;

        if (atomic_load(&server->draining))
            listeners_close(server);
        polled[0] = (struct pollfd){.fd = server->wake_fd, .events = POLLIN};
        for (uint32_t i = 0; i < LISTENER_MAX; i++) {
            if (server->listen_fd[i] < 0)
                continue;
            listener_of[listeners++] = i;
            polled[count++] = (struct pollfd){.fd = server->listen_fd[i], .events = POLLIN};
        }
        pthread_mutex_lock(&server->lock);
        for (uint32_t i = 0; i < server->lingerer_count; i++)
            polled[count++] = (struct pollfd){.fd = server->lingerers[i].fd, .events = POLLIN};
        quiet = server->connection_count == 0 && server->lingerer_count == 0;
        pthread_mutex_unlock(&server->lock);

        if (poll(polled, count, quiet ? -1 : TICK_MS) < 0 && errno != EINTR)
            usleep(TICK_MS * 1000);
        if (polled[0].revents & POLLIN) {
            uint64_t drop;

            if (read(server->wake_fd, &drop, sizeof drop) < 0)
                continue;
        }
        for (nfds_t i = 0; i < listeners; i++) {
            if (polled[1 + i].revents & POLLIN)
                accept_all(server, listener_of[i]);
        }
        now_us = http_now_us();
        if (count > 1 + listeners)
            linger_all(server, now_us);
        if (now_us >= next_tick_us) {
            next_tick_us = now_us + TICK_MS * 1000;
            tick(server, now_us, ++ticks % 10 == 0);
        }
    }
    return NULL;
}

/* Exchanges. */

static void deadline_set(struct http_exchange *exchange, uint64_t deadline_us)
{
    atomic_store(&exchange->connection->deadline_us, deadline_us);
}

static uint64_t transfer_deadline(uint64_t from_us, uint64_t bytes)
{
    return from_us + TRANSFER_SECONDS * SECOND_US + bytes / TRANSFER_BYTES_PER_SECOND * SECOND_US;
}

static void body_free(struct http_exchange *exchange)
{
    atomic_fetch_sub(&exchange->connection->server->body_memory, exchange->body_capacity);
    free(exchange->body);
    exchange->body = NULL;
    exchange->body_capacity = 0;
}

/* Everything a request leaves behind; the connection may serve another one. */
static void exchange_reset(struct http_exchange *exchange)
{
    arena_release(&exchange->arena);
    if (!exchange->reply_static)
        free(exchange->reply_text);
    /* A small buffer serves the next request of a kept-alive connection. */
    if (exchange->body_capacity > BODY_KEEP_BYTES)
        body_free(exchange);
    exchange->method = HTTP_OTHER;
    exchange->path[0] = '\0';
    exchange->route = NULL;
    exchange->origin = NULL;
    exchange->body_bytes = 0;
    exchange->body_received = 0;
    exchange->refusal_status = 0;
    exchange->close_after = false;
    exchange->call = NULL;
    __atomic_store_n(&exchange->cancelled, false, __ATOMIC_RELAXED);
    exchange->reply_status = 0;
    exchange->reply_text = NULL;
    exchange->reply_bytes = 0;
    exchange->reply_static = false;
    exchange->header_name = NULL;
    /* Resumed, but the client was gone before the handler could be called again. */
    if (exchange->deferred)
        atomic_fetch_sub(&exchange->connection->server->deferred, 1);
    exchange->deferred = false;
    exchange->continue_fn = NULL;
    atomic_store(&exchange->resumed, false);
}

static struct http_connection *connection_of(struct MHD_Connection *mhd)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);

    return info ? info->socket_context : NULL;
}

static void on_connection(void *context, struct MHD_Connection *mhd, void **socket_context,
                          enum MHD_ConnectionNotificationCode code)
{
    struct http_server *server = context;
    struct http_connection *connection;

    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD);

        pthread_mutex_lock(&server->lock);
        for (connection = server->connections; connection; connection = connection->next) {
            if (info && connection->fd == (int)info->connect_fd && !connection->started)
                break;
        }
        if (connection)
            connection->started = true;
        pthread_mutex_unlock(&server->lock);
        *socket_context = connection;
        return;
    }
    connection = *socket_context;
    if (!connection)
        return;
    pthread_mutex_lock(&server->lock);
    list_remove(server, connection);
    if (connection->linger) {
        int copy = dup(connection->fd);

        if (copy >= 0)
            linger_add(server, copy);
    }
    pthread_mutex_unlock(&server->lock);
    if (connection->linger)
        wake(server);
    *socket_context = NULL;
    exchange_reset(&connection->exchange);
    body_free(&connection->exchange);
    free(connection);
}

static void *on_request_line(void *context, const char *uri, struct MHD_Connection *mhd)
{
    struct http_connection *connection = connection_of(mhd);
    struct http_exchange *exchange;
    uint64_t deadline_us = http_now_us() + HEADER_SECONDS * SECOND_US;
    size_t bytes;

    (void)context;
    if (!connection)
        return NULL;
    exchange = &connection->exchange;
    exchange->mhd = mhd;
    bytes = strcspn(uri, "?");
    /* A longer path is no route of ours. */
    if (bytes >= sizeof exchange->path)
        bytes = 0;
    memcpy(exchange->path, uri, bytes);
    exchange->path[bytes] = '\0';
    arena_init(&exchange->arena, ARENA_BYTES_MAX);
    atomic_fetch_add(&connection->server->busy, 1);
    atomic_store(&connection->idle_received, NEVER);
    atomic_store(&exchange->state, EXCHANGE_HEAD);
    /* The request line is part of the headers: it must not win them more time. */
    if (deadline_us < atomic_load(&connection->deadline_us))
        deadline_set(exchange, deadline_us);
    return exchange;
}

static void on_completed(void *context, struct MHD_Connection *mhd, void **request_context,
                         enum MHD_RequestTerminationCode code)
{
    struct http_exchange *exchange = *request_context;
    struct http_server *server;

    (void)context;
    (void)mhd;
    (void)code;
    if (!exchange)
        return;
    *request_context = NULL;
    server = exchange->connection->server;
    exchange_reset(exchange);
    deadline_set(exchange, http_now_us() + IDLE_SECONDS * SECOND_US);
    atomic_store(&exchange->connection->idle_received, tcp_received(exchange->connection->fd));
    atomic_store(&exchange->state, EXCHANGE_IDLE);
    atomic_fetch_sub(&server->busy, 1);
}

/* The gate: headers that two parsers could read differently, or that no client of ours sends. */

struct header_walk {
    uint32_t content_lengths;
    uint32_t transfer_encodings;
    uint32_t hosts;
    uint32_t authorizations;
    uint32_t origins;
    bool chunked;
    bool control;
    bool length_malformed;
    uint64_t content_length;
    const char *host;
    const char *origin;
    const char *timeout;
};

static enum MHD_Result on_header(void *context, enum MHD_ValueKind kind, const char *name,
                                 size_t name_bytes, const char *value, size_t value_bytes)
{
    struct header_walk *walk = context;

    (void)kind;
    if (!value)
        value = "";
    for (size_t i = 0; i < value_bytes; i++) {
        unsigned char byte = (unsigned char)value[i];

        if ((byte < 0x20 && byte != '\t') || byte == 0x7f)
            walk->control = true;
    }
    for (size_t i = 0; i < name_bytes; i++) {
        if ((unsigned char)name[i] <= 0x20 || (unsigned char)name[i] == 0x7f)
            walk->control = true;
    }
    if (strcasecmp(name, "Content-Length") == 0) {
        walk->content_lengths++;
        walk->content_length = 0;
        walk->length_malformed |= value_bytes == 0 || value_bytes > 18;
        for (size_t i = 0; i < value_bytes && !walk->length_malformed; i++) {
            walk->length_malformed = value[i] < '0' || value[i] > '9';
            walk->content_length = walk->content_length * 10 + (uint64_t)(value[i] - '0');
        }
    } else if (strcasecmp(name, "Transfer-Encoding") == 0) {
        walk->transfer_encodings++;
        walk->chunked = strcasecmp(value, "chunked") == 0;
    } else if (strcasecmp(name, "Host") == 0) {
        walk->hosts++;
        walk->host = value;
    } else if (strcasecmp(name, "Authorization") == 0) {
        walk->authorizations++;
    } else if (strcasecmp(name, "Origin") == 0) {
        walk->origins++;
        walk->origin = value;
    } else if (strcasecmp(name, "Request-Timeout") == 0) {
        walk->timeout = value;
    }
    return MHD_YES;
}

/* Length of the host in "host", "host:port", "[v6]" or "[v6]:port". */
static size_t host_part(const char *host)
{
    const char *end;

    if (host[0] == '[') {
        end = strchr(host, ']');
        return end ? (size_t)(end - host) + 1 : strlen(host);
    }
    return strcspn(host, ":");
}

static const char *origin_listed(const struct http_server *server, const char *origin)
{
    for (uint32_t i = 0; i < server->options.origin_count; i++) {
        if (strcasecmp(server->options.origins[i], origin) == 0)
            return server->options.origins[i];
    }
    return NULL;
}

/* A web page can give a name of its own the address 127.0.0.1, and then its origin and its Host
 * agree. A name is therefore believed only if it is localhost or configured; addresses cannot be
 * claimed that way. */
static bool host_trusted(const struct http_server *server, const char *host)
{
    size_t bytes = host_part(host);

    if (bytes == 9 && strncasecmp(host, "localhost", 9) == 0)
        return true;
    if (is_ip_literal(host, bytes))
        return true;
    for (uint32_t i = 0; i < server->options.origin_count; i++) {
        const char *name = strstr(server->options.origins[i], "://");

        if (name && host_part(name + 3) == bytes && strncasecmp(name + 3, host, bytes) == 0)
            return true;
    }
    return false;
}

static bool origin_is_ours(const struct http_server *server, const char *origin, const char *host)
{
    const char *name = strstr(origin, "://");

    if (!name || !host || !host_trusted(server, host))
        return false;
    return (strncasecmp(origin, "http://", 7) == 0 || strncasecmp(origin, "https://", 8) == 0) &&
           strcasecmp(name + 3, host) == 0;
}

static void refuse(struct http_exchange *exchange, unsigned status, const char *type,
                   const char *text)
{
    exchange->refusal_status = status;
    exchange->refusal_type = type;
    exchange->refusal_text = text;
}

static enum http_method method_parse(const char *method)
{
    if (strcmp(method, "POST") == 0)
        return HTTP_POST;
    if (strcmp(method, "GET") == 0)
        return HTTP_GET;
    if (strcmp(method, "HEAD") == 0)
        return HTTP_HEAD;
    if (strcmp(method, "OPTIONS") == 0)
        return HTTP_OPTIONS;
    return HTTP_OTHER;
}

static const struct http_route *route_find(const struct http_exchange *exchange)
{
    const struct http_options *options = &exchange->connection->server->options;
    enum http_method method = exchange->method == HTTP_HEAD ? HTTP_GET : exchange->method;

    for (uint32_t i = 0; i < options->route_count; i++) {
        const struct http_route *route = &options->routes[i];

        if (route->method == method && strcmp(route->path, exchange->path) == 0 &&
            (route->on_metrics_port || !exchange->connection->on_metrics_port))
            return route;
    }
    return NULL;
}

static uint64_t timeout_parse(const char *text)
{
    char *end;
    long seconds;

    if (!text || *text < '0' || *text > '9')
        return HTTP_TIMEOUT_SECONDS_DEFAULT;
    errno = 0;
    seconds = strtol(text, &end, 10);
    if (*end != '\0' || errno != 0 || seconds <= 0)
        return HTTP_TIMEOUT_SECONDS_DEFAULT;
    return seconds > 86400 ? 86400 : (uint64_t)seconds;
}

static enum MHD_Result reply_queue(struct http_exchange *exchange);

/* First call for a request: gate, origin, route, length. A refusal is answered at once, without
 * reading the body, or, when the body is small, after dropping it so that the connection lives. */
static enum MHD_Result on_headers(struct http_exchange *exchange, const char *method)
{
    struct http_server *server = exchange->connection->server;
    struct header_walk walk = {0};
    bool drop_body = false;

    exchange->started_us = http_now_us();
    exchange->body_started_us = exchange->started_us;
    exchange->method = method_parse(method);
    atomic_fetch_add(&server->requests, 1);
    MHD_get_connection_values_n(exchange->mhd, MHD_HEADER_KIND, on_header, &walk);
    exchange->deadline_us = exchange->started_us + timeout_parse(walk.timeout) * SECOND_US;

    if (walk.control || walk.length_malformed) {
        refuse(exchange, 400, HTTP_JSON, text_bad_request);
    } else if (walk.content_lengths > 1 || walk.transfer_encodings > 1 || walk.hosts > 1 ||
               walk.authorizations > 1 || walk.origins > 1 ||
               (walk.content_lengths > 0 && walk.transfer_encodings > 0)) {
        refuse(exchange, 400, HTTP_JSON, text_framing);
    } else if (walk.transfer_encodings > 0 && !walk.chunked) {
        refuse(exchange, 501, HTTP_JSON, text_encoding);
    } else if (walk.origin && (exchange->origin = origin_listed(server, walk.origin)) == NULL &&
               !origin_is_ours(server, walk.origin, walk.host)) {
        refuse(exchange, 403, HTTP_JSON, text_origin);
    } else if (walk.host && server->loopback[exchange->connection->on_metrics_port ? 1 : 0] &&
               !host_trusted(server, walk.host)) {
        refuse(exchange, 403, HTTP_JSON, text_host);
    } else if (exchange->method == HTTP_OPTIONS) {
        refuse(exchange, 204, NULL, "");
        drop_body = true;
    } else if ((exchange->route = route_find(exchange)) == NULL) {
        refuse(exchange, 404, HTTP_TEXT, text_not_found);
        drop_body = true;
    } else if (walk.content_length > HTTP_BODY_BYTES_MAX) {
        refuse(exchange, 413, HTTP_JSON, text_too_large);
    }
    if (exchange->refusal_status != 0) {
        bool small = walk.transfer_encodings == 0 && walk.content_length <= DRAIN_BYTES_MAX;

        atomic_fetch_add(&server->requests_refused, exchange->refusal_status != 204);
        if (!drop_body || !small) {
            exchange->close_after = true;
            exchange->connection->linger = true;
            http_reply_static(exchange, exchange->refusal_status, exchange->refusal_type,
                              exchange->refusal_text);
            return reply_queue(exchange);
        }
    }
    atomic_store(&exchange->state, EXCHANGE_BODY);
    deadline_set(exchange, transfer_deadline(exchange->started_us, walk.content_length));
    return MHD_YES;
}

static int body_reserve(struct http_exchange *exchange, size_t wanted)
{
    struct http_server *server = exchange->connection->server;
    size_t capacity = exchange->body_capacity ? exchange->body_capacity : BODY_STEP_BYTES;
    char *grown;

    while (capacity < wanted)
        capacity *= 2;
    if (capacity == exchange->body_capacity)
        return 0;
    if (atomic_fetch_add(&server->body_memory, capacity - exchange->body_capacity) + capacity -
            exchange->body_capacity >
        server->options.body_memory_max)
        goto refuse;
    grown = realloc(exchange->body, capacity);
    if (!grown)
        goto refuse;
    exchange->body = grown;
    exchange->body_capacity = capacity;
    return 0;
refuse:
    atomic_fetch_sub(&server->body_memory, capacity - exchange->body_capacity);
    return -1;
}

/* A response can only be queued before or after the body, so trouble in the middle is noted and
 * the rest is dropped; a client that goes on for ever is cut off. */
static enum MHD_Result on_body(struct http_exchange *exchange, const char *data, size_t bytes)
{
    struct http_server *server = exchange->connection->server;

    exchange->body_received += bytes;
    atomic_fetch_add(&server->received_bytes, bytes);
    deadline_set(exchange, transfer_deadline(exchange->body_started_us, exchange->body_received));
    if (exchange->body_received > 2 * HTTP_BODY_BYTES_MAX)
        return MHD_NO;
    if (exchange->refusal_status != 0)
        return MHD_YES;
    if (exchange->body_received > HTTP_BODY_BYTES_MAX) {
        refuse(exchange, 413, HTTP_JSON, text_too_large);
    } else if (body_reserve(exchange, exchange->body_bytes + bytes + 1) < 0) {
        refuse(exchange, 200, HTTP_JSON, text_memory);
    } else {
        memcpy(exchange->body + exchange->body_bytes, data, bytes);
        exchange->body_bytes += bytes;
        return MHD_YES;
    }
    exchange->close_after = true;
    body_free(exchange);
    exchange->body_bytes = 0;
    return MHD_YES;
}

static enum MHD_Result on_whole(struct http_exchange *exchange)
{
    if (exchange->refusal_status != 0) {
        http_reply_static(exchange, exchange->refusal_status, exchange->refusal_type,
                          exchange->refusal_text);
        return reply_queue(exchange);
    }
    if (body_reserve(exchange, 1) < 0) {
        http_reply_static(exchange, 200, HTTP_JSON, text_memory);
        return reply_queue(exchange);
    }
    exchange->body[exchange->body_bytes] = '\0';
    /* The handler and the engine have the request's own deadline. */
    deadline_set(exchange, NEVER);
    atomic_store(&exchange->state, EXCHANGE_RUNNING);
    exchange->route->handler(exchange);
    return exchange->deferred ? MHD_YES : reply_queue(exchange);
}

static enum MHD_Result on_request(void *context, struct MHD_Connection *mhd, const char *url,
                                  const char *method, const char *version, const char *data,
                                  size_t *data_bytes, void **request_context)
{
    struct http_exchange *exchange = *request_context;
    http_handler fn;

    (void)context;
    (void)mhd;
    (void)url;
    (void)version;
    if (!exchange)
        return MHD_NO;
    switch (atomic_load(&exchange->state)) {
    case EXCHANGE_HEAD:
        return on_headers(exchange, method);
    case EXCHANGE_BODY:
        if (*data_bytes > 0) {
            size_t bytes = *data_bytes;

            *data_bytes = 0;
            return on_body(exchange, data, bytes);
        }
        return on_whole(exchange);
    case EXCHANGE_RUNNING:
        if (!atomic_load(&exchange->resumed))
            return MHD_YES;
        atomic_store(&exchange->resumed, false);
        exchange->deferred = false;
        atomic_fetch_sub(&exchange->connection->server->deferred, 1);
        fn = exchange->continue_fn;
        exchange->continue_fn = NULL;
        if (fn)
            fn(exchange);
        return exchange->deferred ? MHD_YES : reply_queue(exchange);
    default:
        /* Bytes after our early answer. */
        *data_bytes = 0;
        return MHD_YES;
    }
}

static enum MHD_Result reply_queue(struct http_exchange *exchange)
{
    struct http_server *server = exchange->connection->server;
    struct MHD_Response *response;
    enum MHD_Result queued = MHD_NO;
    bool good = true;

    if (exchange->reply_status == 0) {
        log_error("%s: the handler gave no answer", exchange->path);
        http_reply_static(exchange, 500, HTTP_JSON, text_internal);
    }
    if (exchange->reply_static)
        response = MHD_create_response_from_buffer(exchange->reply_bytes, exchange->reply_text,
                                                   MHD_RESPMEM_PERSISTENT);
    else
        response = MHD_create_response_from_buffer_with_free_callback(exchange->reply_bytes,
                                                                      exchange->reply_text, free);
    if (!response)
        return MHD_NO;
    exchange->reply_text = NULL; /* the response's */
    if (exchange->reply_type)
        good = MHD_add_response_header(response, "Content-Type", exchange->reply_type) == MHD_YES;
    good =
        good && MHD_add_response_header(response, "X-Content-Type-Options", "nosniff") == MHD_YES;
    if (good && exchange->header_name)
        good = MHD_add_response_header(response, exchange->header_name, exchange->header_value) ==
               MHD_YES;
    if (good && exchange->origin) {
        static const char *const cors[][2] = {
            {"Access-Control-Allow-Credentials", "true"},
            {"Access-Control-Allow-Headers",
             "Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token, Authorization, accept, "
             "origin, Cache-Control, X-Requested-With"},
            {"Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH"},
            {"Vary", "Origin"},
        };

        good = MHD_add_response_header(response, "Access-Control-Allow-Origin", exchange->origin) ==
               MHD_YES;
        for (size_t i = 0; good && i < sizeof cors / sizeof cors[0]; i++)
            good = MHD_add_response_header(response, cors[i][0], cors[i][1]) == MHD_YES;
    }
    if (good && (exchange->close_after || atomic_load(&server->draining)))
        good = MHD_add_response_header(response, "Connection", "close") == MHD_YES;
    atomic_fetch_add(&server->sent_bytes, exchange->reply_bytes);
    atomic_store(&exchange->state, EXCHANGE_REPLIED);
    deadline_set(exchange, transfer_deadline(http_now_us(), exchange->reply_bytes));
    if (good)
        queued = MHD_queue_response(exchange->mhd, exchange->reply_status, response);
    MHD_destroy_response(response);
    return queued;
}

/* For handlers. */

void *http_context(const struct http_exchange *exchange)
{
    return exchange->connection->server->options.context;
}

struct http_server *http_server_of(const struct http_exchange *exchange)
{
    return exchange->connection->server;
}

char *http_body(struct http_exchange *exchange, size_t *bytes)
{
    *bytes = exchange->body_bytes;
    return exchange->body;
}

const char *http_path(const struct http_exchange *exchange)
{
    return exchange->path;
}

void http_set_call(struct http_exchange *exchange, void *call)
{
    exchange->call = call;
}

void *http_call(const struct http_exchange *exchange)
{
    return exchange->call;
}

const char *http_header(struct http_exchange *exchange, const char *name)
{
    return MHD_lookup_connection_value(exchange->mhd, MHD_HEADER_KIND, name);
}

struct arena *http_arena(struct http_exchange *exchange)
{
    return &exchange->arena;
}

uint64_t http_started_us(const struct http_exchange *exchange)
{
    return exchange->started_us;
}

uint64_t http_deadline_us(const struct http_exchange *exchange)
{
    return exchange->deadline_us;
}

const bool *http_cancelled(const struct http_exchange *exchange)
{
    return &exchange->cancelled;
}

static void resume(struct http_exchange *exchange)
{
    struct MHD_Connection *mhd = exchange->mhd;

    atomic_store(&exchange->resumed, true);
    MHD_resume_connection(mhd);
}

static void reply_set(struct http_exchange *exchange, unsigned status, const char *content_type,
                      char *text, size_t bytes, bool is_static)
{
    exchange->reply_status = status;
    exchange->reply_type = content_type;
    exchange->reply_text = text;
    exchange->reply_bytes = bytes;
    exchange->reply_static = is_static;
    if (exchange->deferred)
        resume(exchange);
}

void http_reply(struct http_exchange *exchange, unsigned status, const char *content_type,
                char *text, size_t bytes)
{
    reply_set(exchange, status, content_type, text, bytes, false);
}

void http_reply_static(struct http_exchange *exchange, unsigned status, const char *content_type,
                       const char *text)
{
    /* libmicrohttpd takes it as void * and does not write to it. */
    union {
        const char *in;
        char *out;
    } borrowed = {.in = text};

    reply_set(exchange, status, content_type, borrowed.out, strlen(text), true);
}

void http_reply_header(struct http_exchange *exchange, const char *name, const char *value)
{
    exchange->header_name = name;
    exchange->header_value = value;
}

void http_defer(struct http_exchange *exchange)
{
    exchange->deferred = true;
    atomic_fetch_add(&exchange->connection->server->deferred, 1);
    /* Before the work is handed out: a resume must not overtake the suspend. */
    MHD_suspend_connection(exchange->mhd);
}

void http_continue(struct http_exchange *exchange, http_handler fn)
{
    exchange->continue_fn = fn;
    resume(exchange);
}

/* Life cycle. */

static void on_panic(void *context, const char *file, unsigned line, const char *reason)
{
    (void)context;
    log_error("libmicrohttpd gave up at %s:%u: %s", file, line, reason ? reason : "no reason");
    abort();
}

/* Targets are compared raw. */
static size_t on_unescape(void *context, struct MHD_Connection *mhd, char *text)
{
    (void)context;
    (void)mhd;
    return strlen(text);
}

static void server_free(struct http_server *server)
{
    listeners_close(server);
    for (uint32_t i = 0; i < server->lingerer_count; i++)
        close(server->lingerers[i].fd);
    if (server->wake_fd >= 0)
        close(server->wake_fd);
    pthread_mutex_destroy(&server->lock);
    free(server);
}

int http_server_start(const struct http_options *options, struct http_server **out,
                      struct error *err)
{
    struct http_server *server = calloc(1, sizeof *server);
    uint32_t threads = options->threads < 2 ? 2 : options->threads;
    sigset_t all;
    sigset_t before;
    int rc = -1;
    int failed;

    if (!server)
        return error_set(err, ERR_NOMEM, "no memory for the HTTP server");
    server->options = *options;
    server->wake_fd = -1;
    for (uint32_t i = 0; i < LISTENER_MAX; i++)
        server->listen_fd[i] = -1;
    pthread_mutex_init(&server->lock, NULL);
    if (listener_open(server, 0, options->listen, err) < 0)
        goto done;
    if (options->metrics_listen) {
        struct error warning = ERROR_INIT;

        if (listener_open(server, 1, options->metrics_listen, &warning) < 0) {
            warning.message[strcspn(warning.message, "\n")] = '\0';
            log_warning("no second listener for health and metrics, they stay on the main port: "
                        "%s",
                        warning.message);
        }
    }
    server->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (server->wake_fd < 0) {
        error_set_errno(err, errno, "eventfd");
        goto done;
    }
    /* Signals are for the main thread: threads inherit a full mask. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    MHD_set_panic_func(on_panic, NULL);
    server->daemon = MHD_start_daemon(
        MHD_USE_EPOLL_INTERNAL_THREAD | MHD_USE_NO_LISTEN_SOCKET | MHD_ALLOW_SUSPEND_RESUME |
            MHD_USE_ITC,
        0, NULL, NULL, on_request, server, MHD_OPTION_THREAD_POOL_SIZE, (unsigned)threads,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)(options->connection_max + threads),
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, CONNECTION_MEMORY_BYTES, MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)(IDLE_SECONDS + 5), MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_NOTIFY_CONNECTION,
        on_connection, server, MHD_OPTION_NOTIFY_COMPLETED, on_completed, server,
        MHD_OPTION_URI_LOG_CALLBACK, on_request_line, server, MHD_OPTION_UNESCAPE_CALLBACK,
        on_unescape, server, MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1, MHD_OPTION_END);
    if (server->daemon) {
        failed = pthread_create(&server->thread, NULL, accept_main, server);
        server->thread_running = failed == 0;
    } else {
        failed = errno ? errno : ENOMEM;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed != 0) {
        error_set_errno(err, failed, "cannot start the HTTP threads");
        goto done;
    }
    *out = server;
    server = NULL;
    rc = 0;
done:
    http_server_stop(server);
    return rc;
}

uint32_t http_server_drain(struct http_server *server, uint32_t timeout_ms)
{
    uint64_t end_us = http_now_us() + (uint64_t)timeout_ms * 1000;
    struct http_connection *connection;

    atomic_store(&server->draining, true);
    wake(server);
    while (atomic_load(&server->busy) > 0 && http_now_us() < end_us)
        usleep(5000);
    pthread_mutex_lock(&server->lock);
    for (connection = server->connections; connection; connection = connection->next) {
        __atomic_store_n(&connection->exchange.cancelled, true, __ATOMIC_RELAXED);
        if (connection->started && atomic_load(&connection->exchange.state) != EXCHANGE_REPLIED)
            expire(connection);
    }
    pthread_mutex_unlock(&server->lock);
    return atomic_load(&server->busy);
}

void http_server_stop(struct http_server *server)
{
    if (!server)
        return;
    if (server->thread_running) {
        http_server_drain(server, 0);
        /* libmicrohttpd cannot stop while a connection is suspended. */
        while (atomic_load(&server->deferred) > 0)
            usleep(1000);
        atomic_store(&server->stopping, true);
        wake(server);
        pthread_join(server->thread, NULL);
    }
    if (server->daemon)
        MHD_stop_daemon(server->daemon);
    server_free(server);
}

const char *http_server_address(const struct http_server *server)
{
    return server->address[0];
}

const char *http_server_metrics_address(const struct http_server *server)
{
    return server->address[1][0] ? server->address[1] : NULL;
}

void http_server_counters(struct http_server *server, struct http_counters *out)
{
    out->connections = atomic_load(&server->connections_total);
    out->connections_refused = atomic_load(&server->connections_refused);
    out->connections_expired = atomic_load(&server->connections_expired);
    out->requests = atomic_load(&server->requests);
    out->requests_refused = atomic_load(&server->requests_refused);
    out->received_bytes = atomic_load(&server->received_bytes);
    out->sent_bytes = atomic_load(&server->sent_bytes);
    pthread_mutex_lock(&server->lock);
    out->connections_open = server->connection_count;
    pthread_mutex_unlock(&server->lock);
    out->requests_running = atomic_load(&server->busy);
}
