// What all parts of the page share. Texts from elsewhere become text nodes, never markup.
export const find = id => document.getElementById(id)

export function make(tag, options = {}, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(options)) {
    if (name === 'class') node.className = value
    else node.setAttribute(name, value)
  }
  node.append(...children)
  return node
}

export function show(node, shown) { node.hidden = !shown }

// set a text only where it differs: a screen reader would read it again, and a selection would be lost
export function write(node, text) { if (node.textContent !== text) node.textContent = text }

export function announce(text) { write(find('live'), text) }

export class Refused extends Error {
  constructor(status, told) {
    super(told.error || `the page's server answered with ${status}`)
    this.status = status
    this.field = told.field || ''
  }
}

async function answered(response) {
  let told
  try { told = await response.json() } catch { told = {} }
  if (response.status === 401 || response.status === 403) {
    told.error = 'This page was opened too long ago: open the address that its command prints in the terminal.'
  }
  if (!response.ok) throw new Refused(response.status, told)
  return told
}

export async function ask(path, body) {
  const json = { 'Content-Type': 'application/json' }
  const sent = body === undefined ? {} : { method: 'POST', body: JSON.stringify(body), headers: json }
  let response
  try { response = await fetch(`api/${path}`, { ...sent, signal: AbortSignal.timeout(60_000) }) }
  catch { throw new Refused(0, { error: 'The page\'s server does not answer; is its command still running?' }) }
  return answered(response)
}

// fetch tells nothing of an upload's progress
export function send(path, file, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest()
    request.open('POST', `api/${path}`)
    request.responseType = 'json'
    request.upload.onprogress = event => onProgress(event.loaded, file.size)
    const refuse = (status, told) => reject(new Refused(status, told))
    const lost = `${file.name} was not sent: the page's server does not answer, or the file cannot be read`
    request.onload = () => {
      if (request.status < 300) resolve(request.response)
      else refuse(request.status, request.response || {})
    }
    request.onerror = () => refuse(0, { error: lost })
    request.send(file)
  })
}

export function size(bytes) {
  if (bytes < 1e6) return `${Math.max(1, Math.round(bytes / 1e3))} kB`
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`
}

export function seconds(value) {
  if (value === null || value === undefined) return ''
  if (value < 90) return `${value.toFixed(1)} s`
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`
}

export function when(at) {
  const date = new Date(at)
  if (Number.isNaN(date.valueOf())) return ''
  const today = date.toDateString() === new Date().toDateString()
  const time = { hour: '2-digit', minute: '2-digit' }
  if (today) return date.toLocaleTimeString([], time)
  return date.toLocaleString([], { ...time, month: 'short', day: 'numeric' })
}

export const WORDS = {
  COMPLETED: 'done', FAILED: 'failed', CANCELLED: 'cancelled', TIMED_OUT: 'timed out', UNKNOWN: 'no longer known',
  IN_QUEUE: 'waiting', IN_PROGRESS: 'running'
}
