// The page: which view is shown, and the list of recent jobs
import { ask, find, make, seconds, show, when, WORDS, write } from './dom.js'
import { guardDrops, setUp } from './form.js'
import * as job from './job.js'

let timer = 0

function route() {
  const [, view, id] = location.hash.match(/^#(\w+)(?:\/(.+))?$/) || []
  if (view === 'main') return find('main').focus() // the skip link
  const shown = view === 'job' && id ? decodeURIComponent(id) : ''
  show(find('view-new'), !shown)
  show(find('view-job'), Boolean(shown))
  show(find('banner'), false)
  if (shown) job.open(shown)
  else { job.leave(); document.title = 'New video · wan_avatar' }
  find(shown ? 'job-title' : 'new-title').focus({ preventScroll: true })
  window.scrollTo(0, 0)
  mark()
  list()
}

function mark() {
  for (const link of find('recent').querySelectorAll('a')) {
    if (link.getAttribute('href') === location.hash) link.setAttribute('aria-current', 'page')
    else link.removeAttribute('aria-current')
  }
}

function row(told) {
  const name = told.picture && told.driving ? `${told.picture} in ${told.driving}` : told.id
  const state = told.state === 'IN_PROGRESS' ? told.stage.toLowerCase() : WORDS[told.state]
  const facts = [state, told.profile, when(told.at), told.seconds && seconds(told.seconds)].filter(Boolean).join(' · ')
  const dot = make('span', { class: `dot ${told.state}`, 'aria-hidden': 'true' })
  const link = make('a', { href: `#job/${encodeURIComponent(told.id)}` })
  link.append(make('span', { class: 'name' }, dot, make('span', {}, name)), make('span', { class: 'facts' }, facts))
  return make('li', {}, link)
}

let drawn = ''

function draw(jobs) {
  if (drawn === JSON.stringify(jobs)) return
  drawn = JSON.stringify(jobs)
  const focused = document.activeElement?.closest('.recent a')?.getAttribute('href')
  find('recent').replaceChildren(...jobs.map(row))
  if (focused) find('recent').querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus()
  mark()
}

async function list() {
  clearTimeout(timer)
  let busy = false
  try {
    const told = await ask('jobs')
    busy = told.jobs.some(j => j.state.startsWith('IN_'))
    draw(told.jobs)
    show(find('recent-empty'), !told.jobs.length)
    write(find('recent-trouble'), told.trouble ? `The bucket could not be listed: ${told.trouble}` : '')
    show(find('recent-trouble'), Boolean(told.trouble))
  } catch (error) {
    write(find('recent-trouble'), error.message)
    show(find('recent-trouble'), true)
    if ([401, 403].includes(error.status)) return
  }
  if (!document.hidden) timer = setTimeout(list, busy ? 3000 : 20_000)
}

document.addEventListener('visibilitychange', () => { if (!document.hidden) { job.wake(); list() } })
window.addEventListener('hashchange', route)
window.addEventListener('jobchange', list)
guardDrops()
try {
  const about = await ask('about')
  setUp(about)
  write(find('place'), about.place)
  route()
} catch (error) {
  write(find('banner'), error.message)
  show(find('banner'), true)
}
