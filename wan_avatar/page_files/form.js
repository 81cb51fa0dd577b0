// The form: two files, a profile and wishes. Files are sent when the job is, so that what is only tried stays here.
import { announce, ask, find, make, send, show, size, write } from './dom.js'

const PARTS = ['picture', 'driving']
const chosen = { picture: null, driving: null } // {file} or {key, name, url}
let about = null

export function setUp(told) {
  about = told
  const own = make('option', { value: '' }, `the worker's own${about.default ? ` (${about.default})` : ''}`)
  find('profile').replaceChildren(own, ...profileOptions(''))
  for (const field of find('form').querySelectorAll('.more .field')) {
    show(field, about.fields.includes(field.querySelector('[name]').name))
  }
  show(find('sample'), about.sample)
  for (const part of PARTS) setUpZone(part)
  find('profile').addEventListener('change', offerQualities)
  find('sample').addEventListener('click', takeSample)
  find('form').addEventListener('submit', event => { event.preventDefault(); submit() })
  offerQualities()
}

function setUpZone(part) {
  const [zone, input] = [find(`zone-${part}`), find(`file-${part}`)]
  input.accept = about.endings[part].join(',')
  input.addEventListener('change', () => { if (input.files.length) choose(part, { file: input.files[0] }) })
  zone.addEventListener('dragover', event => { event.preventDefault(); zone.classList.add('over') })
  zone.addEventListener('dragleave', () => zone.classList.remove('over'))
  zone.addEventListener('drop', event => {
    event.preventDefault()
    zone.classList.remove('over')
    if (event.dataTransfer.files.length) choose(part, { file: event.dataTransfer.files[0] })
  })
}

// a file that is dropped beside the zones would replace the page
export function guardDrops() {
  for (const kind of ['dragover', 'drop']) window.addEventListener(kind, event => event.preventDefault())
}

function unfit(part, file) {
  const endings = about.endings[part]
  if (!endings.some(ending => file.name.toLowerCase().endsWith(ending))) {
    return `${file.name} is no ${part === 'picture' ? 'picture' : 'video'}; its name must end in ${endings.join(', ')}`
  }
  const most = about.most_bytes[part]
  if (file.size > most) return `${file.name} has ${size(file.size)}; at most ${size(most)} are taken`
  return file.size ? '' : `${file.name} is empty`
}

function choose(part, source) {
  const why = source.file ? unfit(part, source.file) : ''
  if (why) return fault(why, part)
  clearFault()
  const shown = find(`shown-${part}`)
  if (shown.src.startsWith('blob:')) URL.revokeObjectURL(shown.src)
  chosen[part] = source
  shown.onerror = () => show(shown, false) // of a format that the browser cannot show; its name stays
  shown.onloadeddata = shown.onload = () => show(shown, true)
  shown.src = source.file ? URL.createObjectURL(source.file) : source.url
  show(shown, true)
  const text = source.file ? `${source.file.name}, ${size(source.file.size)}` : source.name
  write(find(`name-${part}`), text)
  write(find(`hint-${part}`), 'Drop or choose another one to replace it.')
  find(`zone-${part}`).classList.add('filled')
  announce(`${part === 'picture' ? 'Picture' : 'Video'}: ${text}`)
}

// the file a job was made of, as long as this page is open; null: ask the server for it
export function fileOf(key) { return sent.get(key) || null }
const sent = new Map()

async function takeSample() {
  find('sample').disabled = true
  try {
    const told = await ask('sample', {})
    for (const part of PARTS) choose(part, { ...told[part], url: `api/sample/${part}` })
  } catch (error) { fault(error.message) }
  finally { find('sample').disabled = false }
}

function offerQualities() {
  const profile = about.profiles.find(p => p.name === (find('profile').value || about.default))
  const named = profile ? profile.qualities : ['fast', 'standard', 'best']
  for (const option of find('quality').options) option.disabled = option.value !== '' && !named.includes(option.value)
  if (find('quality').selectedOptions[0]?.disabled) find('quality').value = ''
}

function wishes() {
  const found = {}
  for (const field of find('form').querySelectorAll('[name]')) {
    if (!about.fields.includes(field.name) && field.name !== 'profile') continue
    if (field.type === 'checkbox') found[field.name] = field.checked
    else if (field.type === 'number') { if (field.value !== '') found[field.name] = Number(field.value) }
    else if (field.value !== '') found[field.name] = field.value
  }
  return found
}

function fault(text, name = '') {
  write(find('form-fault'), text)
  show(find('form-fault'), true)
  const part = { input_image_minio_path: 'picture', driving_video_path: 'driving' }[name] || name
  if (PARTS.includes(part)) {
    find(`zone-${part}`).classList.add('wrong')
    return find(`file-${part}`).focus()
  }
  const field = find('form').querySelector(`[name="${CSS.escape(name)}"]`)
  if (!field) return
  const details = field.closest('details')
  if (details) details.open = true
  field.setAttribute('aria-invalid', 'true')
  field.setAttribute('aria-describedby', 'form-fault')
  field.focus()
}

function clearFault() {
  show(find('form-fault'), false)
  write(find('form-fault'), '')
  for (const field of find('form').querySelectorAll('[aria-invalid]')) field.removeAttribute('aria-invalid')
  for (const part of PARTS) find(`zone-${part}`).classList.remove('wrong')
}

async function uploaded(part) {
  const source = chosen[part]
  if (source.key) return source.key
  const { file } = source
  const told = await send(`files/${part}?name=${encodeURIComponent(file.name)}`, file, (done, total) => {
    find('sent').value = 100 * done / total
    const going = `sending ${file.name}, ${size(done)} of ${size(total)}`
    write(find('sent-text'), done < total ? going : `${file.name} goes into the bucket`)
  })
  chosen[part] = { ...source, key: told.key, name: told.name }
  if (part === 'driving') {
    sent.set(told.key, file)
    if (sent.size > 20) sent.delete(sent.keys().next().value)
  }
  return told.key
}

async function submit() {
  clearFault()
  const missing = PARTS.find(part => !chosen[part])
  if (missing) return fault(missing === 'picture' ? 'Choose a picture first.' : 'Choose a video first.', missing)
  const wrong = [...find('form').querySelectorAll('input[type=number]')].find(field => field.validity.badInput)
  if (wrong) return fault(`${wrong.labels[0].textContent}: this is not a number.`, wrong.name)
  find('make').disabled = true
  show(find('sending'), true)
  try {
    const files = {}
    for (const part of PARTS) files[part] = await uploaded(part)
    location.hash = `#job/${(await ask('jobs', { fields: wishes(), files })).id}`
  } catch (error) { fault(error.message, error.field) }
  finally {
    find('make').disabled = false
    show(find('sending'), false)
  }
}

// what a job was made of, in the form again
export function prefill(job, profile) {
  clearFault()
  const place = `api/jobs/${encodeURIComponent(job.id)}`
  for (const part of PARTS) if (job.files[part]) choose(part, { ...job.files[part], url: `${place}/${part}` })
  for (const field of find('form').querySelectorAll('[name]')) {
    const value = job.fields[field.name]
    if (field.type === 'checkbox') field.checked = value !== false
    else field.value = value === undefined ? '' : value
  }
  find('profile').value = profile
  offerQualities()
}

export async function startAgain(job, profile) {
  const fields = { ...job.fields, profile }
  const offered = about.profiles.find(p => p.name === profile)
  if (offered && !offered.qualities.includes(fields.quality)) delete fields.quality
  const files = Object.fromEntries(PARTS.map(part => [part, job.files[part]?.key]))
  return ask('jobs', { fields, files })
}

export function profileOptions(selected) {
  return about.profiles.map(p => {
    const option = make('option', { value: p.name }, p.words ? `${p.name} – ${p.words}` : p.name)
    option.selected = p.name === selected
    return option
  })
}
