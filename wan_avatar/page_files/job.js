// One job: where it is, what came of it
import { announce, ask, find, make, seconds, show, size, when, WORDS, write } from './dom.js'
import { fileOf, prefill, profileOptions, startAgain } from './form.js'
import * as player from './player.js'

let job = null // as the server told it last
let id = ''
let timer = 0
let loaded = '' // whose video is in the player
let tries = 0

const address = part => `api/jobs/${encodeURIComponent(id)}/${part}`
const over = () => job && !['IN_QUEUE', 'IN_PROGRESS'].includes(job.state)

export function open(jobId) {
  if (jobId !== id) {
    leave()
    id = jobId
    job = null
    write(find('job-title'), 'Job')
    write(find('job-meta'), '')
    for (const part of ['job-running', 'job-failure', 'job-result', 'job-details', 'again']) show(find(part), false)
  }
  look()
}

export function leave() {
  clearTimeout(timer)
  player.unload()
  id = loaded = ''
}

export function wake() { if (id && (!over() || measuring())) look() }

const measuring = () => job?.quality?.state === 'running'

async function look() {
  clearTimeout(timer)
  const asked = id
  try {
    const told = await ask(`jobs/${encodeURIComponent(asked)}`)
    if (asked !== id) return // another one was opened meanwhile
    tries = 0
    show(find('banner'), false)
    draw(told)
  } catch (error) {
    if (asked !== id) return
    tries += 1
    write(find('banner'), error.message)
    show(find('banner'), true)
    if (error.status === 404) return write(find('job-title'), 'Not known')
    if ([401, 403].includes(error.status)) return
  }
  if ((!over() || measuring()) && !document.hidden) timer = setTimeout(look, Math.min(1000 * (tries + 1), 5000))
}

function draw(told) {
  const before = job?.state
  job = told
  const running = !over()
  const name = job.picture && job.driving ? `${job.picture} in ${job.driving}` : `Video ${job.id}`
  write(find('job-title'), name)
  const took = job.seconds && job.state === 'COMPLETED' && `made in ${seconds(job.seconds)}`
  const facts = [WORDS[job.state], job.profile, job.at && `${job.picture ? 'sent' : 'written'} ${when(job.at)}`, took, `job ${job.id}`]
  write(find('job-meta'), facts.filter(Boolean).join(' · '))
  document.title = `${WORDS[job.state]} · ${name}`
  show(find('job-running'), running)
  if (running) drawSteps()
  drawFailure()
  show(find('job-result'), job.state === 'COMPLETED')
  show(find('job-details'), Boolean(job.result))
  if (job.state === 'COMPLETED') drawResult()
  drawAgain(running)
  if (!before || before === job.state) return
  announce(`The video is ${WORDS[job.state]}`)
  window.dispatchEvent(new Event('jobchange')) // for the list
}

// commands stand between backticks
function writeWithCode(node, text) {
  if (node.dataset.text === text) return
  node.dataset.text = text
  node.replaceChildren(...text.split('`').map((piece, n) => n % 2 ? make('code', {}, piece) : piece))
}

function drawSteps() {
  const list = find('steps')
  if (list.children.length !== job.steps.length) {
    list.replaceChildren(...job.steps.map(step => make('li', {}, make('div', { class: 'step-line' },
      make('span', { class: 'step-title' }, step.title), make('span', { class: 'step-fact' })))))
  }
  job.steps.forEach((step, n) => {
    const item = list.children[n]
    item.className = step.state
    if (step.state === 'now') item.setAttribute('aria-current', 'step')
    else item.removeAttribute('aria-current')
    const known = typeof step.percent === 'number'
    const facts = [step.text, known && `${step.percent} %`, step.eta]
    write(item.querySelector('.step-fact'), facts.filter(Boolean).join(', '))
    let bar = item.querySelector('progress')
    if (step.state !== 'now') return bar?.remove()
    if (!bar) item.append(bar = make('progress', { max: 100, 'aria-label': step.title }))
    if (known) bar.value = step.percent
    else bar.removeAttribute('value')
    announce(step.text ? `${step.title}: ${step.text}` : step.title)
    document.title = `${known ? `${step.percent} % ` : ''}${step.title} · wan_avatar`
  })
  writeWithCode(find('running-warning'), job.warning || '')
  show(find('running-warning'), Boolean(job.warning))
  const box = find('preview-box')
  if (job.preview && box.hidden) find('preview-picture').src = address('preview')
  show(box, job.preview)
}

function drawFailure() {
  const { error } = job
  show(find('job-failure'), Boolean(error) || job.state === 'CANCELLED')
  if (job.state === 'CANCELLED') {
    write(find('failure-title'), 'Cancelled')
    write(find('failure-message'), 'No video was made.')
    write(find('failure-remedy'), '')
    show(find('guard-box'), false)
  }
  if (!error) return
  const at = job.steps.find(step => step.state === 'ended')
  const where = at && job.state !== 'UNKNOWN' ? ` while ${at.title.toLowerCase()}` : ''
  const title = `${WORDS[job.state]}${where}${error.code ? ` (${error.code})` : ''}`
  write(find('failure-title'), title[0].toUpperCase() + title.slice(1))
  write(find('failure-message'), error.message)
  writeWithCode(find('failure-remedy'), error.remedy)
  const picture = find('guard-picture')
  picture.onload = () => show(find('guard-box'), true)
  picture.onerror = () => show(find('guard-box'), false)
  if (job.guard && picture.dataset.job !== id) {
    picture.dataset.job = id
    picture.src = address('guard')
  }
  if (picture.dataset.job !== id) show(find('guard-box'), false)
}

function drawResult() {
  find('download').href = address('video') + '?download=1'
  find('manifest').href = address('manifest') + '?download=1'
  write(find('result-trouble'), job.trouble || '')
  show(find('result-trouble'), Boolean(job.trouble))
  const { result } = job
  show(find('player'), Boolean(result))
  if (!result) return
  if (loaded !== id) {
    loaded = id
    const file = job.files.driving && fileOf(job.files.driving.key)
    const original = file ? URL.createObjectURL(file) : job.files.driving ? address('driving') : ''
    player.load(address('video'), original, result)
    find('notes').replaceChildren(...result.notes.map(note => make('li', {}, note)))
    show(find('notes'), result.notes.length > 0)
    drawFigures(result)
    drawTimeline(result.timeline)
  }
  drawQuality(job.quality)
}

function drawFigures(result) {
  const figures = {
    Size: `${result.width}×${result.height}`, Length: seconds(result.duration_s),
    Frames: `${result.frames} at ${result.fps} a second`, Sound: result.has_audio ? 'yes' : 'none',
    File: size(result.bytes), Profile: result.profile, Seed: String(result.seed), Worker: result.worker
  }
  const rows = Object.entries(figures).filter(([, value]) => value)
  const pair = ([name, value]) => make('div', {}, make('dt', {}, name), make('dd', {}, value))
  find('figures').replaceChildren(...rows.map(pair))
}

function drawTimeline(rows) {
  const end = Math.max(...rows.flatMap(row => row.stretches.map(([, to]) => to)), 0.001)
  find('timeline').replaceChildren(...rows.map(row => {
    const lane = make('div', { class: 'lane' })
    for (const [from, to] of row.stretches) {
      const bar = make('div', { class: 'bar' })
      bar.style.left = `${100 * from / end}%`
      bar.style.width = `${100 * (to - from) / end}%`
      lane.append(bar)
    }
    const spoken = row.stretches.map(([from, to]) => `${from.toFixed(1)} to ${to.toFixed(1)}`).join(', ')
    return make('tr', {}, make('th', { scope: 'row' }, row.name),
      make('td', {}, make('span', { class: 'hidden' }, spoken), lane), make('td', {}, row.seconds.toFixed(2)))
  }))
  write(find('timeline-axis'), `Seconds from 0, when the worker took the job, to ${end.toFixed(1)}.`)
}

function drawQuality(quality) {
  show(find('quality-open'), quality.state === 'open')
  show(find('quality-running'), quality.state === 'running')
  show(find('quality-none'), quality.state === 'not measured')
  show(find('quality-numbers'), quality.state === 'measured')
  if (quality.state === 'running') {
    if (quality.done) find('measured').value = 100 * quality.done / quality.total
    else find('measured').removeAttribute('value')
    write(find('measured-text'), quality.done ? `frame ${quality.done} of ${quality.total}` : 'the networks are loaded')
  }
  if (quality.state === 'not measured') write(find('quality-none'), `Not measured: ${quality.why}.`)
  const body = find('quality-rows')
  if (quality.state !== 'measured' || body.dataset.job === id) return
  body.dataset.job = id
  const numbers = quality.rows.filter(row => row.value !== null)
  const none = quality.rows.filter(row => row.value === null)
  body.replaceChildren(...[...numbers, ...none].map(numberRow))
}

function numberRow(told) {
  const row = make('tr', {}, make('th', { scope: 'row', title: told.source }, told.name))
  if (told.value === null) {
    row.append(make('td', { class: 'quiet', colspan: 3 }, `not measured: ${told.reason}`))
    return row
  }
  const blind = told.circular ? `${told.blind}; read by the tracker that drove it` : told.blind
  row.append(make('td', {}, `${told.value.toPrecision(3)} ${told.unit === '1' ? '' : told.unit}`),
    make('td', {}, told.better === '1' ? 'near 1' : told.better), make('td', { class: 'quiet' }, blind))
  return row
}

function drawAgain(running) {
  const known = Boolean(job.files.picture && job.files.driving)
  if (!running && known && find('again').hidden) {
    find('again-profile').replaceChildren(...profileOptions(job.profile || job.result?.profile))
  }
  show(find('again'), !running && known)
}

find('cancel').addEventListener('click', async event => {
  const button = event.currentTarget
  button.disabled = true
  try { draw(await ask(`jobs/${encodeURIComponent(id)}/cancel`, {})); find('job-title').focus() }
  catch (error) { write(find('banner'), error.message); show(find('banner'), true) }
  finally { button.disabled = false }
})
find('measure').addEventListener('click', async () => {
  find('measure').disabled = true
  try { job.quality = await ask(`jobs/${encodeURIComponent(id)}/quality`, {}); look() }
  catch (error) { job.quality = { state: 'not measured', why: error.message } }
  finally { find('measure').disabled = false }
  drawQuality(job.quality)
})
find('again-start').addEventListener('click', async event => {
  const button = event.currentTarget
  button.disabled = true
  try { location.hash = `#job/${(await startAgain(job, find('again-profile').value)).id}` }
  catch (error) { write(find('banner'), error.message); show(find('banner'), true) }
  finally { button.disabled = false }
})
find('again-edit').addEventListener('click', () => {
  prefill(job, find('again-profile').value)
  location.hash = '#new'
})
